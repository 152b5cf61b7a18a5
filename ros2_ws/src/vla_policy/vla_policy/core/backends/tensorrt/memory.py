"""Where every tensor of an engine's graphs lies on the device: each has one place, for all calls.

So a call's addresses never change, and it can be captured as it is. An output that is carried to an input lies where
that input is read: also in the very memory of the graph's own input where a layer updates a cache. Caches to whose end
rows are appended lie in one block, at one distance, and the new rows of a call in another, so that one copy moves all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_policy.core.errors import ArtefactError
from vla_policy.core.program import ROWS, Call, GraphSpec, TensorSpec

_ALIGNED = 256  # TensorRT wants addresses that are multiples of this


@dataclass(frozen=True)
class Appending:
    """How the new rows of a call come behind those of its caches.

    source, target: addresses of the first tensor of both blocks. source_pitch, target_pitch: bytes from one tensor to
    the next. row: bytes of one row. tensors: how many there are.
    """

    source: int
    source_pitch: int
    target: int
    target_pitch: int
    row: int
    tensors: int


class Memory:
    """Device memory for all tensors of an engine. allocate: so many bytes, aligned, whose content is finite numbers."""

    def __init__(
        self, graphs: Mapping[str, GraphSpec], program: Mapping[str, Call], allocate: Callable[[int], Any]
    ) -> None:
        self._graphs, self._program = graphs, program
        self._shared = {name for call in program.values() for name in call.kept.values()}
        self._check()
        caches = list(dict.fromkeys(name for call in program.values() for name in call.appended.values()))
        self._blocks: list[Any] = []  # pycuda frees what nobody holds
        self._places: dict[tuple[str, str] | str, int] = {}
        if caches:
            self._lay_out(caches, allocate)
        for graph, spec in graphs.items():
            for tensor in (*spec.inputs, *spec.outputs):
                key = self._key(graph, tensor.name)
                if key not in self._places and tensor.name not in self._appended_by(graph):
                    self._places[key] = self._allocate(allocate, self._bytes(graph, tensor))

    def address(self, graph: str, tensor: str) -> int:
        """Of an input, or of an output that is not appended."""
        return self._places[self._key(graph, tensor)]

    def kept(self, tensor: str) -> int:
        """Of an input that something is kept in."""
        return self._places[tensor]

    def longest(self, call: str) -> int | None:
        """Rows that the cache which a call extends can hold; None for a call that extends none."""
        called = self._program[call]
        own = {tensor.name: tensor.shape for tensor in self._graphs[called.graph].inputs}
        lengths = [own[fed][1] for fed in called.appended.values()]
        lengths += [own[fed][2] for fed in called.carried.values() if fed in own]
        return int(lengths[0]) if lengths else None

    def addresses(self, call: str, sizes: Mapping[str, int]) -> dict[str, int]:
        """Of all tensors of a call's graph."""
        graph, appended = self._program[call].graph, self._program[call].appended
        found = {
            tensor.name: self.address(graph, tensor.name)
            for tensor in (*self._graphs[graph].inputs, *self._graphs[graph].outputs)
            if tensor.name not in appended
        }
        if appended:
            pitch = self._pitch(sizes[ROWS])
            found |= {name: self._new_rows + place * pitch for place, name in enumerate(appended)}
        return found

    def appending(self, call: str, sizes: Mapping[str, int]) -> Appending | None:
        """How a call's new rows come to where its caches are; None for a call that has none."""
        appended = self._program[call].appended
        if not appended:
            return None
        first = self._places[next(iter(appended.values()))]
        return Appending(self._new_rows, self._pitch(sizes[ROWS]), first, self._cache_pitch, self._row, len(appended))

    def _check(self) -> None:
        """What is carried into the call's own graph must be of the input's shape: it is the same memory."""
        for name, call in self._program.items():
            own = {tensor.name: tensor for tensor in self._graphs[call.graph].inputs}
            given = {tensor.name: tensor for tensor in self._graphs[call.graph].outputs}
            for output, fed in call.carried.items():
                if fed in own and given[output].shape != own[fed].shape:
                    raise ArtefactError(
                        f"program: call {name} gives {output} {list(given[output].shape)} where {fed} "
                        f"{list(own[fed].shape)} lies; caches have a fixed length here: build the engine again"
                    )
            for sizes in call.variants():
                if free := [size for size, bounds in sizes.items() if bounds.smallest != bounds.largest]:
                    raise ArtefactError(
                        f"program: call {name} leaves the size of {free[0]} open; all are fixed here: build the engine "
                        "again"
                    )

    def _lay_out(self, caches: list[str], allocate: Callable[[int], Any]) -> None:
        """Caches, and the longest call's new rows."""
        shapes = {
            (tensor.shape, tensor.dtype)
            for spec in self._graphs.values()
            for tensor in spec.inputs
            if tensor.name in caches
        }
        if len(shapes) > 1:
            raise ArtefactError("program: caches that rows are appended to differ in shape; build the engine again")
        ((shape, dtype),) = shapes
        length, *row = (int(size) for size in shape[1:])
        self._row = int(np.prod(row)) * np.dtype(dtype).itemsize
        self._cache_pitch = self._pitch(length)
        begin = self._allocate(allocate, self._cache_pitch * len(caches))
        self._places |= {name: begin + place * self._cache_pitch for place, name in enumerate(caches)}
        longest = max(
            sizes[ROWS].largest for call in self._program.values() if call.appended for sizes in call.variants()
        )
        self._new_rows = self._allocate(allocate, self._pitch(longest) * len(caches))

    def _pitch(self, rows: int) -> int:
        return -(-rows * self._row // _ALIGNED) * _ALIGNED

    def _allocate(self, allocate: Callable[[int], Any], size: int) -> int:
        self._blocks.append(allocate(max(size, _ALIGNED)))
        return int(self._blocks[-1])

    def _appended_by(self, graph: str) -> set[str]:
        return {name for call in self._program.values() if call.graph == graph for name in call.appended}

    def _key(self, graph: str, tensor: str) -> tuple[str, str] | str:
        """By which a place is known: the name of the input that it is carried to, if there is one."""
        if tensor in self._shared and any(spec.name == tensor for spec in self._graphs[graph].inputs):
            return tensor
        carried = {fed for call in self._program.values() if call.graph == graph
                   for output, fed in call.carried.items() if output == tensor}  # fmt: skip
        return carried.pop() if carried else (graph, tensor)

    def _bytes(self, graph: str, tensor: TensorSpec) -> int:
        calls = [call for call in self._program.values() if call.graph == graph]
        sizes = [max(call.sizes[size].largest for call in calls) if isinstance(size, str) else size
                 for size in tensor.shape]  # fmt: skip
        return int(np.prod(sizes)) * np.dtype(tensor.dtype).itemsize
