"""`bench.json`: latency, memory and load time of an engine and of 16-bit engines beside it, and which these were."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import read_json, write_json

KIND = "bench"
_VERSION = 4
_REMEDY = "measure again with `engine_build bench --out`"


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds over `count` measurements."""

    median_ms: float
    p90_ms: float
    p99_ms: float
    count: int

    @staticmethod
    def of(values_ms: Sequence[float]) -> "Quantiles":
        median, p90, p99 = np.quantile(values_ms, [0.5, 0.9, 0.99])
        return Quantiles(float(median), float(p90), float(p99), len(values_ms))


@dataclass(frozen=True)
class EngineFigures:
    """One engine's figures. stages: preprocessing, every call of the program by its name, and `action`, the whole.

    engine: its folder's name. backend: what runs it. sha256: of its manifest, which holds the hashes of its files.
    peak_bytes: peak resident memory of a process that only runs this engine, Python and its libraries included.
    idle_bytes: the same process before it loaded the engine.
    """

    engine: str
    backend: str
    sha256: str
    disk_bytes: int
    average_bits: float
    load_s: float
    idle_bytes: int
    peak_bytes: int
    stages: Mapping[str, Quantiles]


@dataclass(frozen=True)
class Bench:
    """All engines' figures, measured in turns in one run. parents: sha256 of the policy, and of the plan if any.

    references: 16-bit engines, at least one; of several backends there may be several.
    """

    engine: EngineFigures
    references: tuple[EngineFigures, ...]
    threads: int
    machine: str
    parents: Mapping[str, str]

    @property
    def reference(self) -> EngineFigures:
        """The fastest of the 16-bit engines: what a user would take instead."""
        return min(self.references, key=lambda figures: figures.stages["action"].median_ms)

    @property
    def speedup(self) -> float:
        """Of the whole action, medians, over the fastest 16-bit engine."""
        return self.speedup_over(self.reference)

    def speedup_over(self, reference: EngineFigures) -> float:
        """Of the whole action, medians."""
        return reference.stages["action"].median_ms / self.engine.stages["action"].median_ms

    def save(self, path: Path | str) -> None:
        sides = {"engine": _to_json(self.engine), "references": [_to_json(one) for one in self.references]}
        write_json(path, {"schema_version": _VERSION, "kind": KIND, **asdict(self), **sides})

    @staticmethod
    def load(path: Path | str) -> "Bench":
        """Raises ArtefactError for a file that is damaged, incomplete or of another version."""
        content = read_json(path, KIND, _VERSION)
        try:
            return Bench(
                _figures(content["engine"]),
                tuple(map(_figures, content["references"])),
                content["threads"],
                content["machine"],
                dict(content["parents"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(f"{path}: entry {error} is missing or malformed; {_REMEDY}") from error


def _to_json(figures: EngineFigures) -> dict[str, Any]:
    """Stages as a list: they have an order, and the keys of a file are sorted."""
    stages = [{"stage": name, **asdict(quantiles)} for name, quantiles in figures.stages.items()]
    return asdict(figures) | {"stages": stages}


def _figures(raw: Mapping[str, Any]) -> EngineFigures:
    stages = {
        entry["stage"]: Quantiles(entry["median_ms"], entry["p90_ms"], entry["p99_ms"], entry["count"])
        for entry in raw["stages"]
    }
    return EngineFigures(**(dict(raw) | {"stages": stages}))
