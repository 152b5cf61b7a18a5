"""Events of several topics to frames: the one implementation behind the live node, the replay and calibration.

The primary camera sets the instants. Every other source contributes the sample whose stamp is nearest. A frame waits
until each source has a sample at or after its stamp, so the choice depends on stamps alone and not on the order in
which the topics happened to arrive: a bag and the live topics give the same frames. Where a source falls silent, a
live system decides the frame after `wait_ms` with the nearest earlier sample, as the end of a recording does. Nothing
is dropped in silence: every frame that is not served comes back as a `Dropped` with its reason.

An episode is what one task lasts. It begins with an instruction that differs from the one before (which may have been
none, or refused), after a pause of the images that is longer than the contract's `episode_gap_s`, and where the clock
is set back. The same instruction said again is no change.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from vla_policy.core.contract import Contract
from vla_policy.core.events import Event
from vla_policy.core.ros_image import EncodedImage

# A stamp this far behind its predecessor means that the clock was set back (a looped bag, a restarted simulator);
# less is a message out of order.
_CLOCK_JUMP_NS = 10**9
_MAX_SAMPLES = 512
# Of a camera that sets no instants: what a first camera's silence may pile up, about 120 MB at 640x480.
_MAX_IMAGES = 128
_MAX_PENDING = 64


class DropReason(Enum):
    """Why a message or a frame was not served."""

    LOST_IN_TRANSPORT = "lost_in_transport"
    INVALID_MESSAGE = "invalid_message"
    OUT_OF_ORDER = "out_of_order"
    CLOCK_JUMP = "clock_jump"
    UNSYNCHRONISED = "unsynchronised"
    NO_INSTRUCTION = "no_instruction"
    INSTRUCTION_CLAIMED = "instruction_claimed"
    SUPERSEDED = "superseded"
    UNDECODABLE = "undecodable"
    NOT_IN_THE_BAG = "not_in_the_bag"
    ENGINE_ERROR = "engine_error"
    QUEUE_FULL = "queue_full"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Dropped:
    """A message or frame that is not served."""

    topic: str
    stamp_ns: int
    reason: DropReason
    detail: str


@dataclass(frozen=True)
class Frame:
    """One synchronised instant. `images`: in the contract's camera order. `state`: float32 [S], None without states.

    `skew_ns`: largest distance of a sample's stamp from `stamp_ns`. `episode`: its number, `step`: its images before
    this one, both from 0.
    """

    stamp_ns: int
    received_ns: int
    images: tuple[EncodedImage, ...]
    state: np.ndarray | None
    instruction: str
    skew_ns: int
    episode: int
    step: int


@dataclass(frozen=True)
class _Pending:
    event: Event
    instruction: str
    episode: int
    step: int


class Synchroniser:
    """Feed events in arrival order with `push`; `expire` in a live system, `flush` at the end of a recording.

    `wait_ns` replaces the contract's `wait_ms`. `instruction`: the task until one arrives.
    """

    def __init__(self, contract: Contract, wait_ns: int | None = None, instruction: str = "") -> None:
        self._contract = contract
        self._slop_ns = round(contract.synchronisation.slop_ms * 1e6)
        self._wait_ns = round(contract.synchronisation.wait_ms * 1e6) if wait_ns is None else wait_ns
        limits = {camera.topic: _MAX_IMAGES for camera in contract.cameras[1:]}
        limits |= {state.key: _MAX_SAMPLES for state in contract.states}
        self._samples: dict[str, deque[Event]] = {topic: deque(maxlen=limit) for topic, limit in limits.items()}
        self._pending: deque[_Pending] = deque()
        self._gap_ns = round(contract.synchronisation.episode_gap_s * 1e9)
        self._last_stamp_ns = 0
        self._instruction = instruction
        self._episode = self._step = 0

    @property
    def instruction(self) -> str:
        """The current task; empty when there is none."""
        return self._instruction

    def offer(self, event: "Event | Dropped") -> list[Frame | Dropped]:
        """`push` for a source whose messages may have been refused; a refused instruction leaves no task at all."""
        if isinstance(event, Event):
            return self.push(event)
        if event.topic == self._contract.instruction.topic:
            self._instruction = ""
        return [event]

    def push(self, event: Event) -> list[Frame | Dropped]:
        """Takes one event; returns the frames that it completes and the messages that it condemns, in stamp order."""
        if event.source == self._contract.instruction.topic:
            return self._set_instruction(event)
        if event.source == self._contract.primary.topic:
            return self._camera(event)
        return self._sample(event)

    def expire(self, now_ns: int) -> list[Frame | Dropped]:
        """Decides the frames that have waited since `wait_ns` before `now_ns` (the clock of `received_ns`)."""
        return self._settle(lambda pending: now_ns - pending.event.received_ns >= self._wait_ns)

    def flush(self) -> list[Frame | Dropped]:
        """Decides every frame that still waits: the end of a recording."""
        return self._settle(lambda pending: True)

    def _set_instruction(self, event: Event) -> list[Frame | Dropped]:
        # Frames that still wait for their state keep the task under which they arrived.
        assert isinstance(event.payload, str)
        if event.payload and event.payload != self._instruction:
            self._begin_episode()
        self._instruction = event.payload
        return []

    def _begin_episode(self) -> None:
        """Nothing changes while the present one has no image."""
        if self._step:
            self._episode, self._step = self._episode + 1, 0

    def _camera(self, event: Event) -> list[Frame | Dropped]:
        behind_ns = self._last_stamp_ns - event.stamp_ns
        if behind_ns > _CLOCK_JUMP_NS:
            return self._set_back(event, behind_ns)
        if self._last_stamp_ns and behind_ns >= 0:
            return [self._dropped(event, DropReason.OUT_OF_ORDER, f"stamp {behind_ns / 1e6:.1f} ms behind the last")]
        if self._last_stamp_ns and -behind_ns > self._gap_ns:
            self._begin_episode()
        self._last_stamp_ns = event.stamp_ns
        if not self._instruction:
            return [self._dropped(event, DropReason.NO_INSTRUCTION, "an image before the task in words")]
        if len(self._pending) >= _MAX_PENDING:
            return [self._dropped(event, DropReason.UNSYNCHRONISED, f"{_MAX_PENDING} frames wait already")]
        self._pending.append(_Pending(event, self._instruction, self._episode, self._step))
        self._step += 1
        return self._settle(lambda pending: False)

    def _sample(self, event: Event) -> list[Frame | Dropped]:
        samples = self._samples[event.source]
        if samples and event.stamp_ns < samples[-1].stamp_ns:
            behind_ns = samples[-1].stamp_ns - event.stamp_ns
            if behind_ns <= _CLOCK_JUMP_NS:
                return [
                    self._dropped(event, DropReason.OUT_OF_ORDER, f"stamp {behind_ns / 1e6:.1f} ms behind the last")
                ]
            samples.clear()
        samples.append(event)
        return self._settle(lambda pending: False)

    def _set_back(self, event: Event, behind_ns: int) -> list[Frame | Dropped]:
        results = self._settle(lambda pending: True)
        for source, samples in self._samples.items():
            current = [sample for sample in samples if sample.stamp_ns - event.stamp_ns <= _CLOCK_JUMP_NS]
            self._samples[source] = deque(current, maxlen=samples.maxlen)
        self._last_stamp_ns = event.stamp_ns
        self._begin_episode()
        detail = f"stamp went back by {behind_ns / 1e9:.3f} s"
        return [*results, self._dropped(event, DropReason.CLOCK_JUMP, detail)]

    def _settle(self, overdue: Callable[[_Pending], bool]) -> list[Frame | Dropped]:
        """Decides waiting frames in order, until one lacks a sample at or after its stamp and is not `overdue`."""
        results: list[Frame | Dropped] = []
        while self._pending:
            stamp_ns = self._pending[0].event.stamp_ns
            late = [samples for samples in self._samples.values() if not samples or samples[-1].stamp_ns < stamp_ns]
            if late and not overdue(self._pending[0]):
                break
            results.append(self._decide(self._pending.popleft()))
            self._forget(stamp_ns)
        return results

    def _forget(self, stamp_ns: int) -> None:
        """Drops the samples that no frame after `stamp_ns` can be nearest to; images are large."""
        for samples in self._samples.values():
            # Samples that all lie before belong to a clock that has just been set back.
            while len(samples) > 1 and samples[1].stamp_ns <= stamp_ns <= samples[-1].stamp_ns:
                samples.popleft()

    def _decide(self, pending: _Pending) -> Frame | Dropped:
        event, skew_ns = pending.event, 0
        images, states = [event.payload], []
        for source, samples in self._samples.items():
            if not samples:
                return self._dropped(event, DropReason.UNSYNCHRONISED, f"no usable message on {source}")
            sample = _nearest(samples, event.stamp_ns)
            skew_ns = max(skew_ns, abs(sample.stamp_ns - event.stamp_ns))
            if skew_ns > self._slop_ns:
                detail = f"nearest message on {source} is {_distance(skew_ns, self._slop_ns)}"
                return self._dropped(event, DropReason.UNSYNCHRONISED, detail)
            if isinstance(sample.payload, np.ndarray):
                states.append(sample.payload)
            else:
                images.append(sample.payload)
        return Frame(
            stamp_ns=event.stamp_ns,
            received_ns=event.received_ns,
            images=tuple(image for image in images if isinstance(image, EncodedImage)),
            state=np.concatenate(states).astype(np.float32) if states else None,
            instruction=pending.instruction,
            skew_ns=skew_ns,
            episode=pending.episode,
            step=pending.step,
        )

    @staticmethod
    def _dropped(event: Event, reason: DropReason, detail: str) -> Dropped:
        return Dropped(event.source, event.stamp_ns, reason, detail)


def _nearest(samples: deque[Event], stamp_ns: int) -> Event:
    """The sample whose stamp is nearest, the later one of two; the search begins at the newest, which is close."""
    best = samples[-1]
    for sample in reversed(samples):
        if abs(sample.stamp_ns - stamp_ns) < abs(best.stamp_ns - stamp_ns):
            best = sample
        elif sample.stamp_ns < stamp_ns:
            break
    return best


def _distance(skew_ns: int, slop_ns: int) -> str:
    if skew_ns > _CLOCK_JUMP_NS:
        return f"{skew_ns / 1e9:.1f} s away; do both publishers stamp with the same clock?"
    return f"{skew_ns / 1e6:.1f} ms away, slop_ms allows {slop_ns / 1e6:g}"
