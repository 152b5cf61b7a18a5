"""What a server tells of itself: counts, rates and percentiles, and the snapshot that diagnostics publish."""

from collections.abc import Iterable
from dataclasses import dataclass

from vla_policy.core.latency import Percentiles, RateCounter, RollingWindow
from vla_policy.core.safety import HoldReason
from vla_policy.core.synchroniser import Dropped, DropReason


@dataclass(frozen=True)
class Latch:
    """A stop that only `reset` takes back."""

    reason: str
    engine_failed: bool = False


@dataclass(frozen=True)
class Drops:
    """How often something was dropped for one reason, and the last time's particulars."""

    count: int
    last: str


@dataclass(frozen=True)
class Status:
    """A snapshot for diagnostics. Ages in milliseconds since each source's last stamp, None before its first message.

    `overhead_ms`: from the image's callback to the published action, less the engine's time for this frame and, while
    it was still busy, for the one before. `run_out`: how often a plan ended before the next one came. `holding`: what
    forbids motion now, or left the last control step without a command. `faults`: what is wrong with a camera or state,
    by source. `received`: messages by topic. `drops`: by reason; one reason's particulars are not lost to another that
    is more frequent.
    """

    active: bool
    enabled: bool
    started: bool
    latch: Latch | None
    instruction: str
    holding: tuple[HoldReason, ...]
    faults: dict[str, HoldReason]
    received: dict[str, int]
    chunks: int
    commands: int
    limited: int
    late: int
    run_out: int
    drops: dict[DropReason, Drops]
    ages_ms: dict[str, float | None]
    rates_hz: dict[str, float]
    latency_ms: Percentiles
    age_ms: Percentiles
    overhead_ms: Percentiles


class Figures:
    """What has happened since the start. Not thread-safe: its owner locks."""

    def __init__(self, topics: Iterable[str]) -> None:
        self.received = dict.fromkeys(topics, 0)
        self.drops: dict[DropReason, Drops] = {}
        self.chunks = self.commands = self.limited = self.late = self.run_out = 0
        self.latency_ms, self.age_ms, self.overhead_ms = RollingWindow(), RollingWindow(), RollingWindow()
        self._rates = {name: RateCounter() for name in (*self.received, "chunks", "commands")}

    def message(self, topic: str, now_ns: int) -> None:
        self.received[topic] += 1
        self._rates[topic].add(now_ns)

    def dropped(self, dropped: Dropped, count: int) -> None:
        former = self.drops.get(dropped.reason, Drops(0, ""))
        self.drops[dropped.reason] = Drops(former.count + count, dropped.detail)

    def chunk(self, latency_ms: float, age_ms: float, late: bool, now_ns: int) -> None:
        self.chunks += 1
        self.late += late
        self._rates["chunks"].add(now_ns)
        self.latency_ms.add(latency_ms)
        self.age_ms.add(age_ms)

    def command(self, limited: bool, now_ns: int) -> None:
        self.commands += 1
        self.limited += limited
        self._rates["commands"].add(now_ns)

    def rates_hz(self, now_ns: int) -> dict[str, float]:
        return {name: counter.rate_hz(now_ns) for name, counter in self._rates.items()}
