"""An engine's program: its graphs, the calls that run them, and what these calls leave on the device for later ones.

A policy's family runs the calls in its own order; a backend's session executes them.

A sequence may be of any length. Either a graph's sizes are free and its cache grows with every call, or all sizes are
fixed: a call then has a few steps of its length and is filled up to the next one, and a cache of fixed length stays
where it is while calls write further rows into it. The session fills, and tells such a graph by two inputs of its own
how many rows are no filling (`COUNT`), and how many rows the cache has (`POSITION`).
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np

from vla_policy.core.errors import ArtefactError

COUNT, POSITION = "count", "position"
"""Inputs, int64 [1], that the session feeds: rows of this call that are no filling, and rows of the cache before it."""
ROWS = "rows"
"""The dimension that holds a call's part of the sequence."""


class Sequences(Enum):
    """How graphs take sequences of any length.

    FREE: sizes are free, and a cache grows by what is joined to it. The others have fixed sizes, are filled up, and
    leave the cache where it is. UPDATED: a layer of the backend writes into it, another turns queries and keys
    (`TensorScatter` and `RotaryEmbedding`). APPENDED: new rows are outputs, which the session writes behind the others.
    """

    FREE = "free"
    UPDATED = "updated"
    APPENDED = "appended"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph; named dimensions vary. `meaning` says what the values are and their units."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str


@dataclass(frozen=True)
class GraphSpec:
    """One graph of the engine: the file that holds it, its inputs and outputs."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def dimensions(self) -> set[str]:
        """Names of the dimensions that vary."""
        return {size for spec in (*self.inputs, *self.outputs) for size in spec.shape if isinstance(size, str)}


@dataclass(frozen=True)
class Range:
    """The sizes that a dimension may have. steps: the only ones that a graph is run with, in ascending order; what is
    fed is filled up to the next. Without steps it is run with any."""

    smallest: int
    typical: int
    largest: int
    steps: tuple[int, ...] = ()

    @staticmethod
    def fixed(size: int) -> "Range":
        return Range(size, size, size)

    @staticmethod
    def in_quarters(before: int, smallest: int, typical: int, largest: int) -> "Range":
        """So many ids behind what is always there, `before`: in four steps, each a multiple of eight but the last."""
        steps = sorted({min(-(-largest * part // 32) * 8, largest) for part in (1, 2, 3, 4)})
        return Range(before + smallest, before + typical, before + largest, tuple(before + step for step in steps))


@dataclass(frozen=True)
class Call:
    """One way to run a graph.

    sizes: of each of the graph's named dimensions; those with steps have equally many and take them together.
    carried: outputs that stay where the backend computes, each with the name of the input that it becomes in later
    calls. One that becomes an input of its own graph and of the same shape is written into that input's memory.
    appended: outputs [1, rows, ...] that stay as well, as further rows of an input [1, length, ...].
    """

    graph: str
    sizes: dict[str, Range]
    carried: dict[str, str]
    appended: dict[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, str]:
        """Outputs that stay, each with the input that it belongs to."""
        return self.carried | self.appended

    def variants(self) -> list[dict[str, Range]]:
        """The sizes that the graph is run with: one step of its length each, or its sizes where there are none."""
        count = max((len(size.steps) for size in self.sizes.values()), default=0)
        return [
            {name: Range.fixed(size.steps[step]) if size.steps else size for name, size in self.sizes.items()}
            for step in range(max(count, 1))
        ]


def check_program(graphs: Mapping[str, GraphSpec], calls: Mapping[str, Call]) -> None:
    """Raises ArtefactError for a call whose graph, sizes or carried tensors do not exist or are incomplete."""
    inputs = {spec.name for call in calls.values() if call.graph in graphs for spec in graphs[call.graph].inputs}
    for name, call in calls.items():
        if call.graph not in graphs:
            raise ArtefactError(f"program: call {name} runs graph {call.graph!r}, which the engine does not have")
        graph = graphs[call.graph]
        if graph.dimensions != set(call.sizes):
            raise ArtefactError(
                f"program: call {name} gives sizes of {sorted(call.sizes)}, graph {call.graph} has the dimensions "
                f"{sorted(graph.dimensions)}"
            )
        if len({len(size.steps) for size in call.sizes.values() if size.steps}) > 1:
            raise ArtefactError(f"program: call {name} has sizes of unequally many steps")
        absent = set(call.kept) - {spec.name for spec in graph.outputs} | set(call.kept.values()) - inputs
        if absent:
            raise ArtefactError(f"program: call {name} carries {sorted(absent)}, which no graph gives or takes")


@dataclass(frozen=True)
class Profile:
    """What a compiled graph is optimised for: a call, and its sizes at one step of its length."""

    call: str
    sizes: Mapping[str, Range]


def profiles(graph: str, graphs: Mapping[str, GraphSpec], calls: Mapping[str, Call]) -> list[Profile]:
    """Those of a graph; none where no input's size varies."""
    if not any(isinstance(size, str) for spec in graphs[graph].inputs for size in spec.shape):
        return []
    return [
        Profile(name, sizes) for name, call in sorted(calls.items()) if call.graph == graph for sizes in call.variants()
    ]


class Session(Protocol):
    """What executes an engine's graphs, one call at a time."""

    @property
    def processor(self) -> str:
        """The CPU or GPU that runs them, by its own name."""
        ...

    def run(self, call: str, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        """All outputs of a call by name, those in `keep` as handles that later calls take as inputs.

        feeds: every input, a NumPy array of the graph's type or such a handle; None for `COUNT` and `POSITION`, and for
        what is kept at a place of its own and not read by this call, whatever is there. All other outputs are NumPy
        arrays. A handle holds until a call that is not fed with it keeps the same output.
        """
        ...


class Program:
    """One decision's calls of an engine, timed. laps: name and milliseconds of every call so far."""

    def __init__(self, graphs: Mapping[str, GraphSpec], calls: Mapping[str, Call], session: Session) -> None:
        self._graphs, self._calls, self._session = graphs, calls, session
        self._kept = {name for call in calls.values() for name in call.kept.values()}
        self.laps: list[tuple[str, float]] = []

    def run(self, call: str, feeds: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Runs one call; returns outputs as arrays, and those that are carried under the names they are fed by.

        feeds: arrays, which get the graph's types, and what earlier calls carried. An input of free size that is not
        fed is empty.
        """
        begun = time.perf_counter()
        kept = self._calls[call].kept
        inputs = self._graphs[self._calls[call].graph].inputs
        unknown = sorted(set(feeds) - {spec.name for spec in inputs})
        if unknown:
            raise ArtefactError(f"call {call}: the engine takes no {', '.join(unknown)}; build it again")
        results = self._session.run(call, {spec.name: self._value(call, spec, feeds) for spec in inputs}, kept)
        self.laps.append((call, (time.perf_counter() - begun) * 1e3))
        values = {name: value for name, value in results.items() if name not in kept}
        return values, {fed: results[name] for name, fed in kept.items()}

    def _value(self, call: str, spec: TensorSpec, feeds: Mapping[str, Any]) -> Any:
        """What an input is fed with."""
        if spec.name in feeds:
            value = feeds[spec.name]
            return np.ascontiguousarray(value, spec.dtype) if isinstance(value, np.ndarray) else value
        if any(isinstance(size, str) for size in spec.shape):
            return np.zeros([0 if isinstance(size, str) else size for size in spec.shape], spec.dtype)
        if spec.name not in self._kept and spec.name not in (COUNT, POSITION):
            raise ArtefactError(f"call {call}: input {spec.name} is not fed; build the engine again")
        return None
