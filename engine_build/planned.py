"""How long an engine's action takes beside what its plan was made for.

Apart from `bench`, which `prove` runs on devices that have no torch: reading a plan needs it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calibrator.allocation.plan import Plan
from vla_policy.core.bench import Bench
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file


@dataclass(frozen=True)
class PlannedLatency:
    """What a plan was made for: milliseconds per action with a number of threads."""

    milliseconds: float
    threads: int


def planned_latency(plan: Path, parents: Mapping[str, str]) -> PlannedLatency:
    """Of the plan in a file. parents: of the engine. Raises ArtefactError where it was not built from this plan, or the
    plan has no latency."""
    loaded = Plan.load(plan)
    if parents.get("plan") != sha256_file(plan):
        raise ArtefactError(f"{plan}: the engine was not built from this plan; name the one that it was built from")
    if loaded.latency_ms is None:
        raise ArtefactError(f"{plan}: has no latency; allocate with --latency-table, or leave --plan out")
    return PlannedLatency(loaded.latency_ms, loaded.details["latency_threads"])


def beside_plan(result: Bench, planned: PlannedLatency) -> str:
    """By how much the engine's action differs from its plan's."""
    measured = result.engine.stages["action"].median_ms
    off = 100 * (measured / planned.milliseconds - 1)
    line = f"a whole action, median: {measured:.2f} ms, planned {planned.milliseconds:.2f} ms, {off:+.1f} %"
    if result.threads != planned.threads:
        line += f"; planned for {planned.threads} threads, measured with {result.threads}"
    return line
