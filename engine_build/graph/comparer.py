"""A graph that is compared with the one in its place instead of being written: what an export would give, byte by byte.

Export is deterministic, so an engine of a policy and a plan has exactly these bytes. The content streams as it does
when it is written: no more than one tensor is in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from engine_build.graph.builder import DataFile, GraphBuilder


@dataclass(frozen=True)
class Difference:
    """A tensor, or the rest of a graph, that is not as expected: how many of its bytes are unequal or missing."""

    what: str
    unequal: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.what} ({self.unequal:,} of {self.bytes:,} bytes)"


class _Existing:
    """A data file that is there; what is written to it is compared with it."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "rb")  # noqa: SIM115 (closed by the builder)
        self._position = 0
        self.unequal = 0

    def write(self, content: bytes, /) -> int:
        there = self._stream.read(len(content))
        self._position += len(content)
        self.unequal += _unequal(there, content)
        return len(content)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """What is there and was not expected counts as unequal."""
        while rest := self._stream.read(1 << 22):
            self.unequal += len(rest)

    def close(self) -> None:
        self._stream.close()


def _unequal(there: bytes, expected: bytes) -> int:
    common = min(len(there), len(expected))
    left, right = np.frombuffer(there, np.uint8, common), np.frombuffer(expected, np.uint8, common)
    return int(np.count_nonzero(left != right)) + max(len(there), len(expected)) - common


class GraphComparer(GraphBuilder):
    """See the module. After `save`: `differences`, and how many tensors and bytes were compared."""

    def __init__(self, path: Path, float_type: int) -> None:
        self.differences: list[Difference] = []
        self.bytes = 0
        super().__init__(path, float_type)

    @property
    def tensors(self) -> int:
        return len(self._tensors)

    def _open_data(self, path: Path) -> DataFile:
        self._existing = _Existing(path)
        return self._existing

    def raw(self, name: str, data_type: int, shape: Sequence[int], content: bytes) -> str:
        before = self._existing.unequal
        result = super().raw(name, data_type, shape, content)
        if unequal := self._existing.unequal - before:
            self.differences.append(Difference(name, unequal, len(content)))
        return result

    def _write_graph(self, content: bytes) -> None:
        counted = sum(difference.unequal for difference in self.differences)
        if rest := self._existing.unequal - counted:
            self.differences.append(Difference(f"{self._data_path.name} outside its tensors", rest, rest))
        self.bytes = self._existing.tell() + len(content)
        there = self.path.read_bytes()
        if there == content:
            return
        found = _parsed(there)
        inline = {tensor.name: tensor for tensor in found.graph.initializer}
        before = len(self.differences)
        for tensor in self._tensors:
            same = inline.get(tensor.name, TensorProto())
            if same.SerializeToString(deterministic=True) != tensor.SerializeToString(deterministic=True):
                unequal = _unequal(same.raw_data, tensor.raw_data) or 1
                self.differences.append(Difference(tensor.name, unequal, max(1, len(tensor.raw_data))))
        if before == len(self.differences):
            rest = _unequal(there, content)
            self.differences.append(Difference(f"the graph in {self.path.name}", rest, len(content)))


def _parsed(content: bytes) -> onnx.ModelProto:
    """The model, or an empty one where the file is none."""
    try:
        model: onnx.ModelProto = onnx.load_from_string(content)
    except DecodeError:
        return onnx.ModelProto()
    return model
