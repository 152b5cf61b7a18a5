"""What a backend gives the build: how its graphs are written, compiled and read back, and how exactly it computes."""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine_build.graph.builder import GraphBuilder
from vla_policy.core.backends.base import LayerKind, Version
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import Call, GraphSpec, Sequences, Session
from vla_policy.core.targets import Target

if TYPE_CHECKING:  # needed to write graphs, not to compile them: a device that only does that has no torch
    from calibrator.quantizers.rows import Part
    from engine_build.graph.context import LinearWriter

LANES, LANE_INPUTS = 16, 64
"""Outputs and inputs that the CPU's kernels of this project take at once."""

SLAB, RUN = 16, 128
"""Outputs and inputs that a warp of the GPU's kernels takes at once; matrices are filled up to whole ones."""

ROUNDED_ACTIVATIONS = 0.01
"""Of a single layer: a quotient on the other side of .5 moves a token's result by up to 1 / 127 of its peak."""
ROUNDED_ACTIVATIONS_TOLERANCE = 0.15
"""Of whole decisions, in which such differences add up."""


@dataclass(frozen=True)
class Layer:
    """A quantizable layer as a linear map, or one part of it. group: layers of one group have one input.

    part: which rows of which layer this is (`calibrator.quantizers.rows`); None of a whole layer. rows: of the policy's
    weight, where an engine does without the others, which are `left_out` in number.
    """

    name: str
    kind: LayerKind
    group: str
    outputs: int
    inputs: int
    bias: bool
    part: "Part | None" = None
    rows: range | None = None
    left_out: int = 0

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Dialect:
    """How the one exporter writes for a backend: activation type, the form of a linear layer and of a sequence.

    fused: whether norms and attention are written as ONNX Runtime's own operators. own_attention: the domain of
    `CausalAttention`, as which attention to a growing cache is written; None where it is not. probe: the name of a
    further file and what writes it, a graph of the quantized formats that an engine has with what must come; None
    without one.
    """

    float_type: int
    linear: "LinearWriter"
    fused: bool = False
    own_attention: str | None = None
    probe: tuple[str, Callable[[GraphBuilder, Sequence[Format]], None]] | None = None
    sequences: Sequences = Sequences.FREE


@dataclass(frozen=True)
class Realised:
    """One layer in what runs: its format, what multiplies it, and its bytes once loaded."""

    format: Format
    arithmetic: str
    resident_bytes: int


@dataclass(frozen=True)
class ReadBack:
    """What a graph became. layers: each as it runs. tensors: names of those that the graph was written with and that
    stand in what was compiled from it, byte for byte; empty where nothing is compiled."""

    layers: Mapping[str, Realised]
    tensors: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Place:
    """Where a layer is: the name of its graph, and there those of its input and its result."""

    graph: str
    x: str
    result: str


@dataclass(frozen=True)
class Written:
    """A policy's graphs as the exporter wrote them into `folder`, and the calls that a decision makes of them.

    places: of every layer.
    """

    folder: Path
    graphs: Mapping[str, GraphSpec]
    program: Mapping[str, Call]
    places: Mapping[str, Place]


def taps_of(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """The values to be shown, each once, by graph."""
    taps: dict[str, dict[str, None]] = {}
    for place in places.values():
        taps.setdefault(place.graph, {}).update({place.x: None, place.result: None})
    return {graph: list(names) for graph, names in taps.items()}


def allowed_error(fmt: Format, backend: "Backend") -> float:
    """What a layer of this format may differ by from torch's on the same input."""
    return backend.float_error if fmt.activation_bits == 16 else ROUNDED_ACTIVATIONS


Seen = Callable[[str, str, np.ndarray], None]


def canonical(fmt: Format, inputs: int) -> Format:
    """The format itself, or per row where one group holds all inputs: the two are the same bytes."""
    whole = fmt.group_size is not None and fmt.group_size >= inputs
    return Format(fmt.weight_bits, fmt.activation_bits, None if whole else fmt.group_size)


def deferred(module: str, function: str) -> Callable[..., Any]:
    """A function of a module that is imported when it is first called: what writes graphs needs torch, and a device
    that only compiles and runs them has none."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*arguments)

    return call


class Backend(Protocol):
    """What builds engines; its folder exports it as `BACKEND`.

    compiles: whether engines hold something else than the written graphs, which only
    their target runs. float_error: what the type of its activations may change in one layer of 16-bit activations, or
    between two layers, of a token's root mean square; see `layerwise`.
    """

    @property
    def compiles(self) -> bool: ...

    @property
    def float_error(self) -> float: ...

    def version(self) -> str:
        """Of what is installed here. Raises ArtefactError saying how to install it."""
        ...

    def dialect(self, version: Version) -> Dialect:
        """How graphs are written for this version."""
        ...

    def compile(self, written: Written, target: Target, replaced: Path) -> dict[str, GraphSpec]:
        """The graphs as the engine shall hold them, in the same folder; raises ArtefactError on failure.

        replaced: the folder of the engine that this one replaces, if there is one.
        """
        ...

    def read_back(
        self, written: Path, built: Path, layers: Mapping[str, Layer], planned: Mapping[str, Format], scratch: Path
    ) -> ReadBack:
        """What a graph became. Raises ArtefactError for a layer that cannot be found.

        written: the graph as exported. built: what runs; the same file unless the backend compiles. scratch: a folder
        for temporary files of the graph's size.
        """
        ...

    def filling(self, fmt: Format) -> tuple[int, int]:
        """Outputs and inputs to whose multiples a layer's codes are filled up."""
        ...

    def tolerance(self, fmt: Format) -> float:
        """What a layer of this format may add to the difference from torch, in standard deviations of the scores."""
        ...

    def open_tapped(
        self, written: Written, manifest: Manifest, taps: Mapping[str, Collection[str]], seen: Seen, scratch: Path
    ) -> Session | None:
        """A session that also shows values inside its graphs; None where the backend has no such thing.

        taps: names of values, by graph. seen: told each of them at every call, under graph and name, in float32.
        scratch: a folder for files of the engine's size that the session needs.
        """
        ...

    def stored_result(self, graph: Path, layer: Layer, fmt: Format, x: np.ndarray) -> np.ndarray:
        """float32 [tokens, out]: what the layer's tensors in a written `graph` give for x [tokens, in], bias added.

        Raises ArtefactError where that cannot be told without the policy.
        """
        ...

    def needs_input_range(self, fmt: Format) -> bool:
        """Whether activations are rounded with a scale that must be known when the engine is built."""
        ...

    def open_layer(self, graph: Path, threads: int) -> Callable[[Mapping[str, np.ndarray]], object]:
        """Runs a graph of one layer, to measure it. Raises ArtefactError where that cannot be done here."""
        ...
