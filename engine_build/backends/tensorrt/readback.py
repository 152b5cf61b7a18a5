"""Which format each layer of a TensorRT engine has, without a GPU: its packed codes, found in the engine's bytes.

An engine can be opened, and TensorRT's inspector asked, only where its GPU is. But weights lie in the serialized engine
as they were given or, if TensorRT knows them as codes, transposed; layers of one input may lie side by side, row for
row. So a layer whose N-bit codes stand there, byte for byte, was built with N bits. 16-bit weights may be merged or
re-ordered by the builder; for those the absence of the policy's tensors proves nothing, and they are reported as built,
not as found.
"""

import mmap
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from calibrator.quantizers.packing import pack, unpack
from engine_build.backends.base import Realised, canonical
from engine_build.packing import transpose, turned
from engine_build.weights import Layer
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION, Format

_WORD = 8
_ALIGNMENT = 4  # seen: whole lines, after a header of 4 n bytes
_CHUNK = 1 << 26
_HEAD = 64
_BITS: dict[int, int] = {TensorProto.INT4: 4, TensorProto.INT8: 8}


@dataclass(frozen=True)
class _Needle:
    """How one layer's codes begin in one of the two orders. neighbours: bytes of a row with all layers of its input."""

    layer: str
    turned: bool
    head: bytes
    neighbours: int


def read_back(
    graph: Path, engine: Path, layers: Mapping[str, Layer], planned: Mapping[str, Format]
) -> dict[str, Realised]:
    """The format of each of `layers` in `engine`, built from `graph`. Raises ArtefactError for codes not found."""
    tensors = {tensor.name: tensor for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer}
    quantized = {name for name in layers if f"{name}.codes" in tensors}
    with open(engine, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = _search(content, graph, tensors, {name: layers[name] for name in sorted(quantized)})
    missing = sorted(quantized - found)
    if missing:
        raise ArtefactError(
            f"{engine}: codes of {len(missing)} layers are not in the engine, e.g. {missing[0]}, planned "
            f"{planned[missing[0]]}; the builder has changed their format"
        )
    plugins = {name for name in quantized if tensors[f"{name}.codes"].data_type not in _BITS}
    return {name: _realised(layer, planned[name], name in found, name in plugins) for name, layer in layers.items()}


def _arithmetic(planned: Format, plugin: bool) -> tuple[str, str]:
    """The form of the codes, and of the activations they multiply."""
    if plugin:
        by = "float16" if planned.activation_bits == 16 else "INT8 per token"
        return f"{planned.weight_bits}-bit codes in the plugin's order", f"{by} activations, by plugin"
    codes = {8: "INT8 codes", 4: "INT4 codes", 2: "2-bit codes, two to an INT4, split at run time"}[planned.weight_bits]
    return codes, "float16 activations" if planned.activation_bits == 16 else "INT8 activations of fixed scale, by Q/DQ"


def _realised(layer: Layer, planned: Format, found: bool, plugin: bool) -> Realised:
    if not found:
        return Realised(FULL_PRECISION, "float16 MatMul, as built", layer.weights * 2)
    codes, activations = _arithmetic(planned, plugin)
    arithmetic = f"{codes} found in the engine; {activations}"
    return Realised(canonical(planned, layer.inputs), arithmetic, layer.weights * planned.weight_bits // 8)


def _search(
    content: mmap.mmap, graph: Path, tensors: Mapping[str, onnx.TensorProto], layers: Mapping[str, Layer]
) -> set[str]:
    """The layers whose codes stand in `content`, at any multiple of four bytes."""
    columns: Counter[str] = Counter()
    for layer in layers.values():
        columns[layer.group] += tensors[f"{layer.name}.codes"].dims[1]
    needles: dict[int, list[_Needle]] = {}
    for name, layer in layers.items():
        tensor = tensors[f"{name}.codes"]
        neighbours = columns[layer.group] * _BITS.get(tensor.data_type, 0) // 8
        for turn in (False, True) if tensor.data_type in _BITS else (False,):
            head = _head(graph, tensor, turn)
            needles.setdefault(int.from_bytes(head[:_WORD], "little"), []).append(_Needle(name, turn, head, neighbours))
    found: set[str] = set()
    for offset, key in _places(content, needles):
        for needle in needles[key]:
            if needle.layer not in found and _stands_at(content, offset, needle, graph, tensors):
                found.add(needle.layer)
    return found


def _places(content: mmap.mmap, keys: Collection[int]) -> Iterator[tuple[int, int]]:
    """Where one of the 8-byte keys stands, and which. Nearly all places are ruled out by a table of two bytes."""
    wanted = np.array(sorted(keys), np.uint64)
    possible = np.zeros(1 << 16, np.bool_)
    possible[(wanted & np.uint64(0xFFFF)).astype(np.int64)] = True
    for start in range(0, len(content), _CHUNK):
        for phase in range(0, _WORD, _ALIGNMENT):
            chunk = content[start + phase : start + phase + _CHUNK]
            words = np.frombuffer(chunk[: len(chunk) // _WORD * _WORD], "<u8")
            candidates = np.flatnonzero(possible[words.view("<u2")[::4]])
            for place in candidates[np.isin(words[candidates], wanted)]:
                yield start + phase + int(place) * _WORD, int(words[place])


def _stands_at(
    content: mmap.mmap, offset: int, needle: _Needle, graph: Path, tensors: Mapping[str, onnx.TensorProto]
) -> bool:
    if content[offset : offset + len(needle.head)] != needle.head:
        return False
    tensor = tensors[f"{needle.layer}.codes"]
    stored = _content(graph, tensor)
    whole = _turned(stored, tensor) if needle.turned else stored.tobytes()
    if content[offset : offset + len(whole)] == whole:
        return True
    if needle.turned or needle.neighbours * tensor.dims[0] <= len(whole):
        return False
    rows = stored.reshape(tensor.dims[0], -1)
    if offset + (len(rows) - 1) * needle.neighbours + rows.shape[1] > len(content):
        return False
    beside = np.ndarray(rows.shape, np.uint8, content, offset, (needle.neighbours, 1))
    return np.array_equal(beside, rows)


def _head(graph: Path, tensor: onnx.TensorProto, turn: bool) -> bytes:
    """The first bytes of the codes as written, [in, out], or transposed, which only needs their first columns."""
    stored = _content(graph, tensor)
    if not turn:
        row = len(stored) // tensor.dims[0]
        return stored[: row if _WORD <= row < _HEAD else _HEAD].tobytes()
    (rows, columns), bits = tensor.dims, _BITS[tensor.data_type]
    wanted = _HEAD * 8 // bits
    if rows < wanted or columns * bits % 8:
        return _turned(stored, tensor)[:_HEAD]
    column = np.ascontiguousarray(stored.reshape(rows, -1)[:wanted, 0])
    return pack(unpack(column.tobytes(), bits, wanted * 8 // bits)[:: 8 // bits], bits)


def _turned(stored: np.ndarray, tensor: onnx.TensorProto) -> bytes:
    """The codes transposed, [out, in]."""
    (rows, columns), bits = tensor.dims, _BITS[tensor.data_type]
    if columns * bits % 8 == 0:
        return transpose(stored.reshape(rows, -1), bits, columns)
    return pack(turned(unpack(stored.tobytes(), bits, rows * columns).reshape(rows, columns)), bits)


def _content(graph: Path, tensor: onnx.TensorProto) -> np.ndarray:
    """A tensor's bytes; of long ones only those that are touched are read."""
    external = {entry.key: entry.value for entry in tensor.external_data}
    if not external:
        return np.frombuffer(tensor.raw_data, np.uint8)
    path, offset = graph.parent / external["location"], int(external["offset"])
    return np.memmap(path, np.uint8, "c", offset, (int(external["length"]),))
