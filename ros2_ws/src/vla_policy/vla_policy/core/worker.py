"""Inference in its own thread, so that a slow engine never blocks a callback."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vla_policy.core.contract import Contract
from vla_policy.core.errors import DataError, EngineError, VlaError
from vla_policy.core.observation import Actor, Decision
from vla_policy.core.observe import observe
from vla_policy.core.synchroniser import Dropped, DropReason, Frame


@dataclass(frozen=True)
class Answer:
    """A frame and the decision for it.

    `latency_ms`: the engine's own time, by the steady clock. `queued_ms`: how long the frame waited because the engine
    was busy with an earlier one.
    """

    frame: Frame
    decision: Decision
    latency_ms: float
    queued_ms: float


@dataclass(frozen=True)
class Refusal:
    """Why there is no decision for a frame: `error` is an EngineError where the engine must not be trusted further."""

    reason: DropReason
    error: VlaError


def decide(actor: Actor, contract: Contract, frame: Frame) -> tuple[Decision, float] | Refusal:
    """The decision for a frame and the milliseconds that the actor took: the node's way, and a replay's."""
    try:
        observation = observe(frame, contract)
    except DataError as error:
        return Refusal(DropReason.UNDECODABLE, error)
    started = time.perf_counter()
    try:
        decision = actor.act(observation)
    except VlaError as error:
        return Refusal(DropReason.ENGINE_ERROR, error)
    return decision, (time.perf_counter() - started) * 1e3


class InferenceWorker:
    """Answers frames in order.

    `lossless`: every frame is answered, up to `capacity` waiting ones. Otherwise a newer frame replaces the one that
    waits, which is reported as superseded. `on_answer` and `on_drop` are called from the worker's thread; so is
    `on_failure`, with the reason, when the engine raised an EngineError, or what is no VlaError, after which the worker
    is dead.
    """

    def __init__(
        self,
        contract: Contract,
        actor: Actor,
        lossless: bool,
        capacity: int,
        on_answer: Callable[[Answer], None],
        on_drop: Callable[[Dropped], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._contract = contract
        self._actor = actor
        self._capacity = capacity if lossless else 1
        self._lossless = lossless
        self._on_answer, self._on_drop, self._on_failure = on_answer, on_drop, on_failure
        self._waiting: deque[tuple[Frame, float]] = deque()
        self._free_since_s = 0.0
        self._changed = threading.Condition()
        self._stopping = False
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def dead(self) -> bool:
        """Whether the thread has ended without being told to: there will be no further answer."""
        return self._thread.ident is not None and not self._thread.is_alive() and not self._stopping

    def submit(self, frame: Frame) -> list[Dropped]:
        """Queues a frame; returns those that this displaced."""
        with self._changed:
            if len(self._waiting) < self._capacity:
                self._waiting.append((frame, time.perf_counter()))
                self._changed.notify_all()
                return []
            if self._lossless:
                return [self._dropped(frame, DropReason.QUEUE_FULL, f"{self._capacity} frames wait already")]
            displaced, _ = self._waiting.popleft()
            self._waiting.append((frame, time.perf_counter()))
            return [self._dropped(displaced, DropReason.SUPERSEDED, "a newer frame came before the engine was free")]

    def discard(self) -> list[Dropped]:
        """Empties the queue: a stop, or another task."""
        with self._changed:
            frames, self._waiting = [frame for frame, _ in self._waiting], deque()
            return [self._dropped(frame, DropReason.STOPPED, "the policy was stopped") for frame in frames]

    def drain(self, timeout_s: float) -> bool:
        """Waits until every queued frame is answered. False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after the decision that runs. False when that decision outlasts `timeout_s`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (waiting := self._next()) is not None:
                self._answer(*waiting)
        finally:
            # Reached without a stop only when the engine raised: the traceback goes to stderr, the robot is held.
            if not self._stopping:
                self._on_failure("see the log, then clean up and configure again")

    def _next(self) -> tuple[Frame, float] | None:
        with self._changed:
            self._busy = False
            self._free_since_s = time.perf_counter()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopping or self._waiting)
            if self._stopping:
                return None
            self._busy = True
            return self._waiting.popleft()

    def _answer(self, frame: Frame, submitted_s: float) -> None:
        queued_ms = max(0.0, self._free_since_s - submitted_s) * 1e3
        outcome = decide(self._actor, self._contract, frame)
        if not isinstance(outcome, Refusal):
            self._on_answer(Answer(frame, *outcome, queued_ms))
            return
        if isinstance(outcome.error, EngineError):
            self._on_failure(str(outcome.error))
        self._on_drop(self._dropped(frame, outcome.reason, str(outcome.error)))

    def _dropped(self, frame: Frame, reason: DropReason, detail: str) -> Dropped:
        return Dropped(self._contract.primary.topic, frame.stamp_ns, reason, detail)
