"""`/diagnostics` from the node's start on, in whatever state it is, and a log line for each change of it.

The level says what was wrong in the last period, not since the activation; the values count since then.
"""

import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.impl.rcutils_logger import RcutilsLogger
from rclpy.node import Node
from rclpy.qos import QoSProfile
from std_msgs.msg import Header

from vla_policy.core.latency import Percentiles
from vla_policy.core.safety import MEANT, HoldReason
from vla_policy.core.status import Status
from vla_policy.core.synchroniser import Dropped, DropReason

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR
PERIOD = "diagnostic_updater.period"
# What the newest-frame mode leaves out on purpose, and what waits for a task or ends with the node's activity.
_MEANT_DROPS = {
    DropReason.SUPERSEDED,
    DropReason.NO_INSTRUCTION,
    DropReason.INSTRUCTION_CLAIMED,
    DropReason.STOPPED,
}
_QUIET_S = 5.0
_CAUSES = 32
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


@dataclass(frozen=True)
class Report:
    """What there is to say. state: one line; it is logged when it changes, so it holds no counts.

    troubles: how often each thing has gone wrong so far; one that has happened in the last period is a warning.
    """

    level: bytes
    state: str
    values: Mapping[str, str] = field(default_factory=dict)
    troubles: Mapping[str, int] = field(default_factory=dict)


class Diagnostics:
    """Publishes until `close`, from a thread of its own: a transition that takes long, or waits, is told of as well.

    report: what to say now. engine: hex sha256 of the engine's manifest, empty before there is one.
    """

    def __init__(self, node: Node, report: Callable[[], Report], engine: Callable[[], str]) -> None:
        self._node, self._report, self._engine = node, report, engine
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", QoSProfile(depth=10))
        self._lock = threading.Lock()
        self._told: Report | None = None
        self._recent = _Recent()
        self._drops = _DropLog()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="diagnostics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """The last word is what `tell` said before."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def tell(self) -> None:
        """Logs what has changed and publishes, from any thread."""
        with self._lock:
            report, log = self._report(), self._node.get_logger()
            if self._told is None or (self._told.level, self._told.state) != (report.level, report.state):
                _log(log, report.level, report.state)
            self._told = report
            for line in self._drops.ended():
                log.info(line)
            recent = self._recent.of(report.troubles, self._node.get_parameter(PERIOD).value)
            self._publisher.publish(self._message(report, recent))

    def dropped(self, dropped: Dropped) -> None:
        """Logs the first of its cause; those that follow are counted until there are no more."""
        if (line := self._drops.begun(dropped)) is not None:
            _log(self._node.get_logger(), OK if dropped.reason in _MEANT_DROPS else WARN, line)

    def _run(self) -> None:
        while not self._closing.is_set():
            self.tell()
            self._closing.wait(self._node.get_parameter(PERIOD).value)

    def _message(self, report: Report, recent: Sequence[str]) -> DiagnosticArray:
        level = max(report.level, WARN) if recent else report.level
        message = f"{report.state}; in the last period: {', '.join(recent)}" if recent else report.state
        entry = DiagnosticStatus(
            level=level,
            name=f"{self._node.get_fully_qualified_name()}: policy",
            message=message,
            hardware_id=self._engine(),
            values=[KeyValue(key=key, value=value) for key, value in report.values.items()],
        )
        return DiagnosticArray(header=Header(stamp=self._node.get_clock().now().to_msg()), status=[entry])


class _Recent:
    """Which counts have risen within the last period, by the steady clock."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._risen_s: dict[str, float] = {}

    def of(self, counts: Mapping[str, int], period_s: float) -> list[str]:
        now_s = time.monotonic()
        for name, count in counts.items():
            if count > self._counts.get(name, 0):
                self._risen_s[name] = now_s
        self._counts = dict(counts)
        return [name for name in counts if now_s - self._risen_s.get(name, -math.inf) < period_s]


class _DropLog:
    """Two lines for each time in which messages are dropped for one cause: when it begins and when it has ended.

    A cause is a reason with its particulars, numbers aside: the frames that a broken state leaves unsynchronised must
    not hide why it is broken. Beyond `_CAUSES` at once, which no robot but only hostile messages have, none is told.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[DropReason, str], tuple[int, float]] = {}

    def begun(self, dropped: Dropped) -> str | None:
        cause = dropped.reason, _NUMBER.sub("", dropped.detail)
        with self._lock:
            count, _ = self._open.get(cause, (0, 0.0))
            if not count and len(self._open) == _CAUSES:
                return None
            self._open[cause] = (count + 1, time.monotonic())
        if count:
            return None
        return f"dropped {dropped.topic} at {dropped.stamp_ns} ns: {dropped.reason.value}: {dropped.detail}"

    def ended(self) -> list[str]:
        with self._lock:
            now_s = time.monotonic()
            quiet = [cause for cause, (_, last_s) in self._open.items() if now_s - last_s > _QUIET_S]
            return [f"no more dropped for {cause[0].value}, after {self._open.pop(cause)[0]}" for cause in quiet]


def _log(log: RcutilsLogger, level: bytes, line: str) -> None:
    # One call per place: rclpy refuses one place that logs at several levels.
    if level == ERROR:
        log.error(line)
    elif level == WARN:
        log.warning(line)
    else:
        log.info(line)


def serving(identity: Mapping[str, str], watchdog_holds: int, status: Status, unheard: Sequence[str]) -> Report:
    """Of an active node: rates, ages, latencies, drops by reason and the engine.

    unheard: the command topics that nobody subscribes to.
    """
    level, state = _summary(status, unheard)
    values = dict(identity)
    values |= {
        "instruction": status.instruction,
        "enabled": str(status.enabled),
        "started": str(status.started),
        "latch": status.latch.reason if status.latch else "",
        "holding": ", ".join(reason.value for reason in status.holding),
        "chunks": str(status.chunks),
        "commands": str(status.commands),
        "commands limited": str(status.limited),
        "decisions late": str(status.late),
        "chunks run out": str(status.run_out),
        "watchdog holds": str(watchdog_holds),
        "without subscriber": ", ".join(unheard),
    }
    values |= {f"fault {topic}": reason.value for topic, reason in status.faults.items()}
    for reason, drops in sorted(status.drops.items(), key=lambda item: item[0].value):
        values |= {f"drops {reason.value}": str(drops.count), f"last {reason.value}": drops.last}
    values |= {f"received {topic}": str(count) for topic, count in status.received.items()}
    values |= {f"rate {topic} (Hz)": f"{rate:.2f}" for topic, rate in status.rates_hz.items()}
    values |= {f"age {topic} (ms)": "never" if age is None else f"{age:.1f}" for topic, age in status.ages_ms.items()}
    for label, window in (("latency", status.latency_ms), ("age", status.age_ms), ("overhead", status.overhead_ms)):
        values |= _percentiles(label, window)
    troubles = {reason.value: drops.count for reason, drops in status.drops.items() if reason not in _MEANT_DROPS}
    troubles |= {"decisions late": status.late, "chunks run out": status.run_out, "watchdog holds": watchdog_holds}
    return Report(level, state, values, troubles)


def _summary(status: Status, unheard: Sequence[str]) -> tuple[bytes, str]:
    if status.latch is not None:
        return ERROR, f"stopped until reset: {status.latch.reason}"
    wrong = [reason for reason in status.holding if reason not in MEANT]
    if wrong:
        return ERROR, f"held by a fault: {', '.join(_with_topics(reason, status) for reason in wrong)}"
    if status.holding:
        return OK, f"holding: {', '.join(reason.value for reason in status.holding)}"
    if unheard:
        return WARN, f"commands reach nobody: no subscriber on {', '.join(unheard)}"
    return OK, "serving"


def _with_topics(reason: HoldReason, status: Status) -> str:
    topics = [topic for topic, fault in status.faults.items() if fault is reason]
    return f"{reason.value} ({', '.join(topics)})" if topics else reason.value


def _percentiles(label: str, window: Percentiles) -> dict[str, str]:
    if math.isnan(window.p50):
        return {}
    return {
        f"{label} p50 (ms)": f"{window.p50:.2f}",
        f"{label} p99 (ms)": f"{window.p99:.2f}",
        f"{label} max (ms)": f"{window.maximum:.2f}",
    }
