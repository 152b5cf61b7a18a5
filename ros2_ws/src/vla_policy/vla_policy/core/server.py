"""The policy server: everything that the ROS node does, without ROS.

Messages go in with `receive`, chunks come out through `on_chunk`, and `tick` says once per control step what the robot
should do. Times are nanoseconds of the node's clock, which may be simulated; `receive`, `tick` and the services may be
called from different threads.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_policy.core.chunks import Chunk, ChunkExecutor
from vla_policy.core.contract import Contract
from vla_policy.core.errors import DataError
from vla_policy.core.events import Event, to_events, to_instruction
from vla_policy.core.gate import Gate
from vla_policy.core.observation import Actor
from vla_policy.core.safety import Command, Halts, HoldReason, Limiter
from vla_policy.core.sources import SourceMonitor
from vla_policy.core.status import Figures, Latch, Status
from vla_policy.core.synchroniser import Dropped, DropReason, Frame, Synchroniser
from vla_policy.core.worker import Answer, InferenceWorker

_JOIN_TIMEOUT_S = 5.0
_RUN_OUT = (HoldReason.NO_CHUNK, HoldReason.DEADLINE_MISSED)
# Without a robot that waits, a frame may wait for its state until the slowest transport has delivered it.
LOSSLESS_WAIT_NS = 10 * 10**9


@dataclass(frozen=True)
class ServerSettings:
    """Times in seconds; 0 turns the frozen-camera check and disarming off. See the node's parameters."""

    lossless: bool = False
    queue_size: int = 256
    source_timeout_s: float = 0.5
    future_tolerance_s: float = 0.05
    disarm_after_s: float = 5.0
    inference_deadline_s: float = 0.5
    freeze_timeout_s: float = 1.0
    chunk_grace_s: float = 0.1
    blending: str = "latest"
    ensemble_decay: float = 0.1


@dataclass(frozen=True)
class ServedChunk:
    """One decision as it is published. `actions`: float64 [horizon, K], as the engine gave them.

    `age_ms`: from the image's stamp to the decision. `usable`: False where it came too late to move the robot.
    """

    sequence: int
    frame: Frame
    actions: np.ndarray
    tokens: np.ndarray
    steps_per_action: int
    latency_ms: float
    age_ms: float
    usable: bool


@dataclass(frozen=True)
class Step:
    """One control step. `command`: what to send, None for silence. `reasons`: for holding; empty where it moves."""

    command: Command | None
    reasons: tuple[HoldReason, ...]


class PolicyServer:
    """Serves one policy under one contract; see the module's text."""

    def __init__(
        self,
        contract: Contract,
        actor: Actor,
        settings: ServerSettings,
        clock: Callable[[], int],
        on_chunk: Callable[[ServedChunk], None],
        on_drop: Callable[[Dropped], None],
    ) -> None:
        self._contract, self._actor, self._settings, self._clock = contract, actor, settings, clock
        self._on_chunk, self._on_drop = on_chunk, on_drop
        self._lock = threading.RLock()
        self._synchroniser = Synchroniser(contract, LOSSLESS_WAIT_NS if settings.lossless else None)
        self._limiter = Limiter(contract.action)
        self._chunks = ChunkExecutor(
            contract.action.control_period_ns,
            round(settings.chunk_grace_s * 1e9),
            round(settings.inference_deadline_s * 1e9),
            self._limiter.discrete,
            settings.blending,
            settings.ensemble_decay,
        )
        self._sources = SourceMonitor(
            contract, settings.source_timeout_s, settings.future_tolerance_s, settings.freeze_timeout_s
        )
        self._worker = InferenceWorker(
            contract,
            actor,
            settings.lossless,
            settings.queue_size,
            self._answered,
            self._drop,
            lambda why: self.stop(Latch(f"the engine failed: {why}", engine_failed=True)),
        )
        rivals = {HoldReason.OTHER_PUBLISHER} if contract.action.other_publishers == "disarm" else ()
        self._gate = Gate(settings.disarm_after_s, rivals)
        self._claim: Event | Dropped | None = None  # while a run has its instruction: what follows it
        self._task_refused = False
        self._moving = False
        self._late_since_chunk = False
        self._wanting: HoldReason | None = None
        self._last_tick_ns: int | None = None
        self._halts = Halts(contract.action.hold_commands)
        self._figures = Figures(contract.input_types)

    # --- life ---------------------------------------------------------------------------------------------------

    def activate(self) -> None:
        """Begins to answer frames."""
        with self._lock:
            self._gate.active = True
        self._worker.start()

    def silence(self) -> None:
        """Forbids motion for good. Inactive and disabled at once: nobody sees the consequence without the cause."""
        with self._lock:
            self._gate.close()
            self._chunks.clear()

    def deactivate(self) -> bool:
        """Silences and ends the worker. False when the engine did not come back in time."""
        self.silence()
        for dropped in self._worker.discard():
            self._drop(dropped)
        return self._worker.stop(_JOIN_TIMEOUT_S)

    def drain(self, timeout_s: float) -> bool:
        """Decides what waits for its state and answers every queued frame: the end of a recording."""
        with self._lock:
            results = self._synchroniser.flush()
        self._handle(results)
        return self._worker.drain(timeout_s)

    # --- input --------------------------------------------------------------------------------------------------

    def receive(self, topic: str, message: Any) -> None:
        """Takes a message of one of the contract's topics."""
        now_ns = self._clock()
        with self._lock:
            self._figures.message(topic, now_ns)
        events: list[Event] | list[Dropped]
        try:
            events = to_events(self._contract, topic, message, now_ns)
            if topic == self._contract.instruction.topic:
                self._check_task(events)
        except DataError as error:
            events = [Dropped(topic, now_ns, DropReason.INVALID_MESSAGE, str(error))]
        if topic == self._contract.instruction.topic and self._claim is not None:
            (self._claim,) = events
            self._drop(Dropped(topic, now_ns, DropReason.INSTRUCTION_CLAIMED, "a run has its own until it ends"))
        else:
            self._offer(events)

    def _offer(self, events: Sequence[Event | Dropped]) -> None:
        with self._lock:
            results: list[Frame | Dropped] = []
            for event in events:
                self._note(event)
                results += self._synchroniser.offer(event)
        self._handle(results)

    def lost(self, topic: str, count: int) -> None:
        """Counts images that the transport did not deliver."""
        dropped = Dropped(
            topic, self._clock(), DropReason.LOST_IN_TRANSPORT, f"{count} images never arrived on {topic}"
        )
        self._drop(dropped, count)

    def instruct(self, text: str) -> str:
        """Sets the instruction as its topic would. Returns it as the policy uses it; raises DataError if refused."""
        if self._claim is not None:
            raise DataError("a run has its own instruction until it ends; cancel it first")
        return self._instruct(text)

    def _instruct(self, text: str) -> str:
        event = to_instruction(self._contract, text, self._clock())
        self._check_task([event])
        self._offer([event])
        return str(event.payload)

    def _check_task(self, events: Sequence[Event]) -> None:
        """Raises DataError for an instruction that the policy cannot take; an empty one is none."""
        for event in events:
            if event.payload:
                try:
                    self._actor.check_instruction(str(event.payload))
                except DataError as error:
                    raise DataError(f"{event.source}: {error}") from error

    def claim(self, text: str) -> None:
        """`instruct` for a run, whose instruction stays until `finish`, whatever topic and service say meanwhile.

        Raises DataError as `instruct` does.
        """
        former = to_instruction(self._contract, self._synchroniser.instruction, self._clock())
        self.instruct(text)
        self._claim = former

    def _note(self, event: Event | Dropped) -> None:
        instruction = self._contract.instruction.topic
        if isinstance(event, Dropped):
            if event.topic == instruction:
                self._task_refused = True
                self._chunks.clear()
            return
        if event.source == instruction:
            self._task_refused = False
        if event.source == instruction and event.payload != self._synchroniser.instruction:
            self._chunks.clear()
        self._sources.see(event)

    def _handle(self, results: list[Frame | Dropped]) -> None:
        for result in results:
            if isinstance(result, Dropped):
                self._drop(result)
            elif self._gate.active:
                for dropped in self._worker.submit(result):
                    self._drop(dropped)

    def _drop(self, dropped: Dropped, count: int = 1) -> None:
        with self._lock:
            self._figures.dropped(dropped, count)
            if dropped.reason is DropReason.CLOCK_JUMP:
                self._chunks.clear()
        self._on_drop(dropped)

    # --- decisions ----------------------------------------------------------------------------------------------

    def _answered(self, answer: Answer) -> None:
        now_ns = self._clock()
        age_ms = (now_ns - answer.frame.stamp_ns) / 1e6
        actions = np.atleast_2d(answer.decision.action)
        deadline_ms = self._settings.inference_deadline_s * 1e3
        with self._lock:
            late = max(answer.latency_ms, age_ms) > deadline_ms
            current = self._gate.active and answer.frame.instruction == self._synchroniser.instruction
            usable = current and not late
            self._late_since_chunk = late
            if usable:
                config = self._actor.config
                most = self._contract.action.chunk_rows or config.executed
                self._chunks.submit(Chunk.of(answer.frame.stamp_ns, actions, config.steps_per_action, most))
            chunk = ServedChunk(
                sequence=self._figures.chunks,
                frame=answer.frame,
                actions=actions,
                tokens=answer.decision.tokens,
                steps_per_action=self._actor.config.steps_per_action,
                latency_ms=answer.latency_ms,
                age_ms=age_ms,
                usable=usable,
            )
            self._figures.chunk(answer.latency_ms, age_ms, late, now_ns)
        self._on_chunk(chunk)
        total_ms = (self._clock() - answer.frame.received_ns) / 1e6
        with self._lock:
            self._figures.overhead_ms.add(total_ms - answer.latency_ms - answer.queued_ms)

    def tick(self) -> Step:
        """What the robot should do now: called once per control step.

        A hold ends a motion with the contract's number of holds and then falls silent, so that whoever takes over is
        not fought. Where nothing was commanded there is nothing to end.
        """
        with self._lock:
            now_ns = self._clock()  # under the lock: read before, another thread's later step would look like a jump
            reasons = self._reasons(now_ns)
            self._last_tick_ns = now_ns
            if reasons:
                self._chunks.clear()  # what was planned before is not what is to be done after
            outcome = None if reasons else self._command(now_ns)
            self._wanting = outcome if isinstance(outcome, HoldReason) else None
            self._figures.run_out += self._moving and outcome in _RUN_OUT
            self._moving = isinstance(outcome, Command)
            if isinstance(outcome, Command):
                self._gate.moved()
                self._halts.moved()
                self._chunks.carried_out(now_ns)
                self._figures.command(outcome.limited, now_ns)
                return Step(outcome, ())
            held = tuple(reasons) if outcome is None else (outcome,)
            self._gate.held(held, now_ns)
            if not self._gate.started:
                self._chunks.clear()
            return Step(self._halt(now_ns), held)

    def last_halt(self) -> Command | None:
        """One hold if a motion has not ended: for the end of service, and for the watchdog. Waits for nobody: the
        control loop that stands still may hold the lock."""
        return self._halt(self._clock())

    def _halt(self, now_ns: int) -> Command | None:
        """The next hold of a motion that has to end, None when it has ended."""
        if not self._halts.due:
            self._limiter.rest(self._positions())
            return None
        target = self._positions() if self._halts.target is None else self._halts.target
        self._halts.sent(target)
        return self._limiter.halt(target, now_ns)

    def _command(self, now_ns: int) -> Command | HoldReason:
        """What is due now, or why nothing is although motion is allowed."""
        action = self._chunks.action(now_ns)
        if action is None:
            return HoldReason.DEADLINE_MISSED if self._late_since_chunk else HoldReason.NO_CHUNK
        command = self._limiter.command(action, now_ns, self._sources.room(self._limiter.targets, now_ns))
        return HoldReason.STALE_STATE if command is None else command

    def _positions(self) -> np.ndarray | None:
        return self._sources.positions(self._limiter.targets)

    def _faults(self, now_ns: int) -> dict[str, HoldReason]:
        refused = {self._contract.instruction.topic: HoldReason.REFUSED_INSTRUCTION} if self._task_refused else {}
        return self._sources.faults(now_ns) | refused | self._gate.outside

    def _reasons(self, now_ns: int) -> list[HoldReason]:
        reasons = self._gate.reasons()
        if not self._synchroniser.instruction and not self._task_refused:
            reasons.append(HoldReason.NO_INSTRUCTION)
        if now_ns == 0:  # simulated time of which nothing was heard
            reasons.append(HoldReason.NO_CLOCK)
        if self._last_tick_ns is not None and now_ns < self._last_tick_ns:
            reasons.append(HoldReason.CLOCK_JUMP)
        return list(dict.fromkeys([*reasons, *self._faults(now_ns).values()]))

    @property
    def enabled(self) -> bool:
        """False in the dry run."""
        return self._gate.enabled

    # --- services -----------------------------------------------------------------------------------------------

    def report(self, faults: Mapping[str, HoldReason]) -> None:
        """What is wrong outside of the inputs now, by what it concerns: the node looks, this holds."""
        with self._lock:
            self._gate.outside = dict(faults)

    def obstacle(self) -> str | None:
        """Why `start` would be refused, beside the dry run; None if nothing stands in the way."""
        return self._gate.obstacle()

    def enable(self, enabled: bool) -> None:
        """Allows motion and starts; or back to the dry run."""
        with self._lock:
            self._gate.enable(enabled)
            self._chunks.clear()
            if enabled:
                self._begin()

    def start(self) -> str | None:
        """Resumes after a stop was reset. Returns why not, or None."""
        with self._lock:
            refused = self._gate.start()
            if refused is None:
                self._begin()
            return refused

    def _begin(self) -> None:
        """Motion begins where the robot is now, whatever was commanded before."""
        self._halts.forget()
        self._limiter.rest(self._positions())

    def finish(self) -> None:
        """Ends motion without a latch: a run is over. The instruction is again what the topic says."""
        with self._lock:
            self._gate.started = False
            self._chunks.clear()
        former, self._claim = self._claim, None
        if former is not None:
            self._offer([former])

    def stop(self, latch: Latch) -> None:
        """Latches a stop, unless one is: the robot is held until `reset` and then `start`."""
        with self._lock:
            self._gate.stop(latch)
            self._chunks.clear()

    def reset(self) -> str | None:
        """Takes the latch back; motion needs a new `start`. Returns why not, or None."""
        with self._lock:
            if self._gate.latch is not None and self._gate.latch.engine_failed and self._worker.dead:
                return "the engine has failed and cannot answer; deactivate, clean up, configure and activate again"
            self._gate.latch = None
            self._chunks.clear()
            return None

    def expire(self) -> None:
        """Decides frames whose state did not come in time; call a few times per second."""
        with self._lock:
            results = self._synchroniser.expire(self._clock())
        self._handle(results)

    def status(self) -> Status:
        """A consistent snapshot."""
        with self._lock:
            now_ns = self._clock()
            reasons = self._reasons(now_ns)
            wanting = [] if self._wanting is None else [self._wanting]
            figures = self._figures
            return Status(
                active=self._gate.active,
                enabled=self._gate.enabled,
                started=self._gate.started,
                latch=self._gate.latch,
                instruction=self._synchroniser.instruction,
                holding=tuple(reasons or wanting),
                faults=self._faults(now_ns),
                received=dict(figures.received),
                chunks=figures.chunks,
                commands=figures.commands,
                limited=figures.limited,
                late=figures.late,
                run_out=figures.run_out,
                drops=dict(figures.drops),
                ages_ms=self._sources.ages_ms(now_ns),
                rates_hz=figures.rates_hz(now_ns),
                latency_ms=figures.latency_ms.percentiles(),
                age_ms=figures.age_ms.percentiles(),
                overhead_ms=figures.overhead_ms.percentiles(),
            )
