"""A toy backend's robot side: ONNX's reference implementation, one operator after the other in NumPy."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from vla_policy.core.backends.base import ROW, Rule, Version, Workload
from vla_policy.core.manifest import Manifest


@dataclass(frozen=True)
class Handle:
    """What stays "on the device"."""

    values: np.ndarray


class ToySession:
    processor = "a toy"

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._program = manifest.program
        self._graphs = {
            name: ReferenceEvaluator(onnx.load_from_string(_content(folder, manifest, spec.file)))
            for name, spec in manifest.graphs.items()
        }

    def run(self, call: str, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        graph = self._graphs[self._program[call].graph]
        given = {name: value.values if isinstance(value, Handle) else value for name, value in feeds.items()}
        results = dict(zip(graph.output_names, graph.run(None, given), strict=True))
        return {name: Handle(value) if name in keep else value for name, value in results.items()}


def _content(folder: Path, manifest: Manifest, name: str) -> bytes:
    with manifest.mapped_file(folder, name) as content:
        return bytes(content)


class Toy:
    name = "toy"
    fuses_groups = False
    splits_layers = False

    def refused(self, version: Version) -> tuple[tuple[str, str], ...]:
        return (("w4a16", "the toy knows bytes only"),)

    def rules(self, version: Version) -> tuple[Rule, ...]:
        wide = Rule(16, 16, (ROW,), "float32")
        return (wide, Rule(8, 16, (ROW,), "codes times scales")) if version >= (2,) else (wide,)

    def why_faster_here(self, workload: Workload) -> None:
        return None

    def files_named_in(self, graph: Path) -> set[str]:
        return set()

    def open_session(self, folder: Path, manifest: Manifest, threads: int | None) -> ToySession:
        return ToySession(folder, manifest)


BACKEND = Toy()
