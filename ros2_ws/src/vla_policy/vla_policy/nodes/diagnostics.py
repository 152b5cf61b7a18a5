"""`/diagnostics` from a server's status."""

import math

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from std_msgs.msg import Header

from vla_policy.core.latency import Percentiles
from vla_policy.core.safety import MEANT, HoldReason
from vla_policy.core.status import Status


def to_diagnostics(
    name: str, stamp: Time, identity: dict[str, str], watchdog_holds: int, status: Status
) -> DiagnosticArray:
    """One status for the policy; the values name rates, ages, latencies, drops by reason and the engine."""
    level, message = _summary(status)
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
        "watchdog holds": str(watchdog_holds),
    }
    values |= {f"fault {topic}": reason.value for topic, reason in status.faults.items()}
    for reason, drops in sorted(status.drops.items(), key=lambda item: item[0].value):
        values |= {f"drops {reason.value}": str(drops.count), f"last {reason.value}": drops.last}
    values |= {f"received {topic}": str(count) for topic, count in status.received.items()}
    values |= {f"rate {topic} (Hz)": f"{rate:.2f}" for topic, rate in status.rates_hz.items()}
    values |= {f"age {topic} (ms)": "never" if age is None else f"{age:.1f}" for topic, age in status.ages_ms.items()}
    for label, window in (("latency", status.latency_ms), ("age", status.age_ms), ("overhead", status.overhead_ms)):
        values |= _percentiles(label, window)
    entry = DiagnosticStatus(
        level=level,
        name=f"{name}: policy",
        message=message,
        hardware_id=identity.get("engine", ""),
        values=[KeyValue(key=key, value=value) for key, value in values.items()],
    )
    return DiagnosticArray(header=Header(stamp=stamp), status=[entry])


def _summary(status: Status) -> tuple[bytes, str]:
    if status.latch is not None:
        return DiagnosticStatus.ERROR, f"stopped until reset: {status.latch.reason}"
    wrong = [reason for reason in status.holding if reason not in MEANT]
    if wrong:
        return DiagnosticStatus.ERROR, f"held by a fault: {', '.join(_with_topics(reason, status) for reason in wrong)}"
    if status.holding:
        return DiagnosticStatus.OK, f"holding: {', '.join(reason.value for reason in status.holding)}"
    if status.drops or status.late:
        drops = sum(item.count for item in status.drops.values())
        return DiagnosticStatus.WARN, f"serving; {drops} drops, {status.late} late"
    return DiagnosticStatus.OK, "serving"


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
