"""Typed readers of what other parts write: trade-off curve, decisions served and in process, rollouts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import read_json
from vla_policy.core.formats import Choice

_T = TypeVar("_T")


def _read(path: Path, kind: str, parse: Callable[[dict[str, Any]], _T], remedy: str, schema_version: int = 1) -> _T:
    """Parses an artefact; what its own schema does not allow becomes an ArtefactError that says what to do."""
    content = read_json(path, kind, schema_version)
    try:
        return parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(f"{path}: entry {error} is missing or malformed; {remedy}") from error


@dataclass(frozen=True)
class FrontierPoint:
    """The best plan of one size. size_bits: everything in the engine. greedy_objective: QVLA's, None if it fails."""

    size_bits: int
    average_bits: float
    objective: float
    greedy_objective: float | None


@dataclass(frozen=True)
class Frontier:
    """The trade-off between size and objective, smallest size first. sensitivity_sha256: of its parent."""

    points: tuple[FrontierPoint, ...]
    sensitivity_sha256: str
    signal: str

    @staticmethod
    def load(path: Path) -> "Frontier":
        def parse(raw: dict[str, Any]) -> Frontier:
            names = FrontierPoint.__dataclass_fields__
            points = [FrontierPoint(**{name: point[name] for name in names}) for point in raw["points"]]
            ordered = tuple(sorted(points, key=lambda point: point.size_bits))
            return Frontier(ordered, raw["parents"]["sensitivity_sha256"], raw["signal"])

        return _read(path, "frontier", parse, "write it again with `calibrator allocate --frontier`")


@dataclass(frozen=True)
class ServedDecision:
    """One decision: action as float64 values, row-major over its steps. Times are None where nobody measured them."""

    stamp_ns: int
    instruction: str
    tokens: tuple[int, ...]
    action: tuple[float, ...]
    latency_ms: float | None
    response_ms: float | None


@dataclass(frozen=True)
class ServedRun:
    """Decisions by stamp, frames that were offered, and what was dropped by reason. engine_sha256: of its manifest."""

    decisions: tuple[ServedDecision, ...]
    expected: int
    drops: Mapping[str, int]
    duration_s: float
    engine_sha256: str

    @staticmethod
    def load(path: Path) -> "ServedRun":
        def parse(raw: dict[str, Any]) -> ServedRun:
            decisions = _decisions(raw)
            return ServedRun(
                decisions, raw["expected"], dict(raw["drops"]), raw["duration_s"], raw["parents"]["engine"]
            )

        return _read(path, "served", parse, "serve the bag again")


@dataclass(frozen=True)
class ReferenceDecisions:
    """Full-precision decisions on the frames of a bag, by stamp. engine_sha256: of the manifest of who decided."""

    decisions: Mapping[int, ServedDecision]
    engine_sha256: str

    @staticmethod
    def load(path: Path) -> "ReferenceDecisions":
        def parse(raw: dict[str, Any]) -> ReferenceDecisions:
            by_stamp = {decision.stamp_ns: decision for decision in _decisions(raw)}
            return ReferenceDecisions(by_stamp, raw["parents"]["engine"])

        return _read(path, "decisions", parse, "decide the bag again with the 16-bit engine")


@dataclass(frozen=True)
class Parity:
    """Frames of the bag, those that were served, and those whose action equals the in-process one bit for bit."""

    frames: int
    served: int
    equal: int

    @staticmethod
    def load(path: Path) -> "Parity":
        def parse(raw: dict[str, Any]) -> Parity:
            return Parity(raw["frames"], raw["served"], raw["equal"])

        return _read(path, "parity", parse, "serve the bag again")


def _decisions(raw: Mapping[str, Any]) -> tuple[ServedDecision, ...]:
    found = [
        ServedDecision(
            stamp_ns=int(entry["stamp_ns"]),
            instruction=str(entry.get("instruction", "")),
            tokens=tuple(entry["tokens"]),
            action=tuple(float.fromhex(value) for value in entry["actions_hex"]),
            latency_ms=entry.get("latency_ms"),
            response_ms=entry.get("response_ms"),
        )
        for entry in raw["decisions"]
    ]
    return tuple(sorted(found, key=lambda decision: decision.stamp_ns))


@dataclass(frozen=True)
class Rollout:
    """Closed-loop successes of one policy or engine, with the 95 % interval that was written beside them.

    kind: "policy" or "engine". actor_sha256: of the policy's files or of the engine's folder.
    """

    kind: str
    actor: str
    actor_sha256: str
    benchmark: str
    successes: int
    trials: int
    rate: float
    low: float
    high: float

    @staticmethod
    def load(path: Path) -> "Rollout":
        def parse(raw: dict[str, Any]) -> Rollout:
            total, settings = raw["total"], raw["settings"]
            low, high = total["wilson95"]
            actor, uniform = settings["actor"], settings["actor"]["uniform"]
            name = f"{actor['kind']} {actor['name']}" + (f" in {Choice.from_json(uniform)}" if uniform else "")
            figures = total["successes"], total["trials"], total["rate"], low, high
            return Rollout(actor["kind"], name, actor["sha256"], str(settings["benchmark"]), *figures)

        return _read(path, "rollout", parse, "run `evaluation rollout` again", 2)
