"""An engine's program: its graphs, the calls that run them, and what these calls leave on the device for later ones.

A policy's family runs the calls in its own order; a backend's session executes them.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vla_policy.core.errors import ArtefactError


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
    """The sizes that a dimension may have."""

    smallest: int
    typical: int
    largest: int

    @staticmethod
    def fixed(size: int) -> "Range":
        return Range(size, size, size)


@dataclass(frozen=True)
class Call:
    """One way to run a graph.

    sizes: of each of the graph's named dimensions. carried: outputs that stay where the backend computes, each with the
    name of the input that it becomes in later calls.
    """

    graph: str
    sizes: dict[str, Range]
    carried: dict[str, str]


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
        absent = set(call.carried) - {spec.name for spec in graph.outputs} | set(call.carried.values()) - inputs
        if absent:
            raise ArtefactError(f"program: call {name} carries {sorted(absent)}, which no graph gives or takes")


def profiles(graph: str, graphs: Mapping[str, GraphSpec], calls: Mapping[str, Call]) -> list[str]:
    """The calls that a compiled graph is optimised for, each by itself; none where no input's size varies."""
    varies = any(isinstance(size, str) for spec in graphs[graph].inputs for size in spec.shape)
    return sorted(name for name, call in calls.items() if call.graph == graph) if varies else []


class Session(Protocol):
    """What executes an engine's graphs, one call at a time."""

    @property
    def processor(self) -> str:
        """The CPU or GPU that runs them, by its own name."""
        ...

    def run(self, call: str, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        """All outputs of a call by name, those in `keep` as handles that later calls take as inputs.

        feeds: every input, a NumPy array of the graph's type or such a handle. All other outputs are NumPy arrays. A
        handle holds until a call that is not fed with it keeps the same output.
        """
        ...


class Program:
    """One decision's calls of an engine, timed. laps: name and milliseconds of every call so far."""

    def __init__(self, graphs: Mapping[str, GraphSpec], calls: Mapping[str, Call], session: Session) -> None:
        self._graphs, self._calls, self._session = graphs, calls, session
        self.laps: list[tuple[str, float]] = []

    def run(self, call: str, feeds: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Runs one call; returns outputs as arrays, and those that are carried under the names they are fed by.

        feeds: arrays, which get the graph's types, and what earlier calls carried. An input of free size that is not
        fed is empty.
        """
        begun = time.perf_counter()
        carried = self._calls[call].carried
        inputs = self._graphs[self._calls[call].graph].inputs
        unknown = sorted(set(feeds) - {spec.name for spec in inputs})
        if unknown:
            raise ArtefactError(f"call {call}: the engine takes no {', '.join(unknown)}; build it again")
        results = self._session.run(call, {spec.name: _value(call, spec, feeds) for spec in inputs}, carried)
        self.laps.append((call, (time.perf_counter() - begun) * 1e3))
        values = {name: value for name, value in results.items() if name not in carried}
        return values, {fed: results[name] for name, fed in carried.items()}


def _value(call: str, spec: TensorSpec, feeds: Mapping[str, Any]) -> Any:
    """What an input is fed with."""
    if spec.name in feeds:
        value = feeds[spec.name]
        return np.ascontiguousarray(value, spec.dtype) if isinstance(value, np.ndarray) else value
    shape = [0 if isinstance(size, str) else size for size in spec.shape]
    if 0 not in shape:
        raise ArtefactError(f"call {call}: input {spec.name} is not fed; build the engine again")
    return np.zeros(shape, spec.dtype)
