"""What a TensorRT engine holds, without a GPU: the tensors of its graph, found in the engine's bytes.

An engine can be opened, and TensorRT's inspector asked, only where its GPU is. But weights lie in TensorRT-RTX's
engines as they were given or, where TensorRT multiplies by them, transposed; those of layers of one input may lie side
by side, row for row. So a layer whose N-bit codes stand there, byte for byte, was built with N bits, and a 16-bit
weight, norm, scale or embedding that stands there is the exported one. What the builder merged with something else
(two biases, a scale with a constant) is not found and not claimed. TensorRT itself may interleave what it multiplies by
as a kernel wants it: there only the codes of plugins, which it does not understand, are sure to be found.
"""

import mmap
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from engine_build.backends.base import Layer, Realised, canonical
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION, Format

_WORD = 8
_ALIGNMENT = 4  # seen: whole lines, after a header of 4 n bytes
_CHUNK = 1 << 26
_HEAD = 64  # bytes; what is shorter could stand anywhere by chance,
_DISTINCT = 4  # and so could as few different bytes as zeros or ones have; codes have to be found
# Types that are sought, and the bits of those whose matrices TensorRT may turn.
_TURNED: dict[int, int] = {TensorProto.INT4: 4, TensorProto.INT8: 8, TensorProto.FLOAT16: 16}
_SOUGHT = (*_TURNED, TensorProto.INT32, TensorProto.FLOAT, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class _Needle:
    """By what one tensor is recognised in one of the two orders. head: bytes of it, `offset` behind its first.
    neighbours: bytes of a row with all layers of its input."""

    tensor: str
    turned: bool
    offset: int
    head: bytes
    neighbours: int


def find_tensors(graph: Path, engine: Path, layers: Mapping[str, Layer], turned: bool) -> frozenset[str]:
    """The tensors of `graph` that stand in `engine` byte for byte. turned: transposed, too."""
    tensors = {
        tensor.name: tensor
        for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer
        if tensor.data_type in _SOUGHT and stored_length(tensor) >= _HEAD
    }
    with open(engine, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return frozenset(_search(content, graph, tensors, layers, turned))


def packed_layers(graph: Path, layers: Mapping[str, Layer]) -> dict[str, bool]:
    """The layers that are stored as codes, and of each whether a plugin takes them."""
    tensors = {tensor.name: tensor for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer}
    codes = {name: tensors[f"{name}.codes"] for name in layers if f"{name}.codes" in tensors}
    return {name: tensor.data_type == TensorProto.INT32 for name, tensor in codes.items()}


def readers(graph: Path, layers: Collection[str]) -> dict[str, str]:
    """Of each of the layers, the node that reads its codes; layers of one input may have one node."""
    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    read = {name: node.name for node in nodes for name in node.input}
    return {layer: read[f"{layer}.codes"] for layer in layers}


def check_found(engine: Path, names: Collection[str], found: Collection[str], planned: Mapping[str, Format]) -> None:
    """Raises ArtefactError unless the codes of all the layers `names` were found."""
    missing = sorted(name for name in names if f"{name}.codes" not in found)
    if missing:
        raise ArtefactError(
            f"{engine}: codes of {len(missing)} layers are not in the engine, e.g. {missing[0]}, planned "
            f"{planned[missing[0]]}; the builder has changed their format"
        )


def realised(layer: Layer, planned: Format, plugin: bool, how: str) -> Realised:
    """A layer as it runs, of which `how` says in words by what that is known."""
    if planned == FULL_PRECISION:
        return Realised(FULL_PRECISION, f"float16 MatMul, {how}", layer.weights * 2)
    codes, activations = _arithmetic(planned, plugin)
    return Realised(
        canonical(planned, layer.inputs), f"{codes} {how}; {activations}", layer.weights * planned.weight_bits // 8
    )


def _arithmetic(planned: Format, plugin: bool) -> tuple[str, str]:
    """The form of the codes, and of the activations they multiply."""
    if plugin:
        by = "float16" if planned.activation_bits == 16 else "INT8 per token"
        return f"{planned.weight_bits}-bit codes in the plugin's order", f"{by} activations, by plugin"
    codes = {8: "INT8 codes", 4: "INT4 codes", 2: "2-bit codes, two to an INT4, split at run time"}[planned.weight_bits]
    return codes, "float16 activations" if planned.activation_bits == 16 else "INT8 activations of fixed scale, by Q/DQ"


def _search(
    content: mmap.mmap,
    graph: Path,
    tensors: Mapping[str, onnx.TensorProto],
    layers: Mapping[str, Layer],
    turned: bool,
) -> set[str]:
    """The tensors that stand in `content`, at any multiple of four bytes."""
    inputs = {f"{layer.name}.{part}": (layer.group, part) for layer in layers.values() for part in ("codes", "weight")}
    columns: Counter[tuple[str, str]] = Counter()
    for name, tensor in tensors.items():
        if name in inputs:
            columns[inputs[name]] += tensor.dims[-1]
    needles: dict[int, list[_Needle]] = {}
    for name, tensor in tensors.items():
        bits = _TURNED.get(tensor.data_type, 0)
        neighbours = columns[inputs[name]] * bits // 8 if name in inputs else 0
        for turn in (False, True) if turned and bits and len(tensor.dims) == 2 else (False,):
            offset, head = _head(graph, tensor, turn)
            if len(set(head)) < _DISTINCT and not name.endswith(".codes"):
                continue
            needle = _Needle(name, turn, offset, head, neighbours)
            needles.setdefault(int.from_bytes(head[:_WORD], "little"), []).append(needle)
    found: set[str] = set()
    for offset, key in _places(content, needles):
        for needle in needles[key]:
            if needle.tensor not in found and _stands_at(content, offset, needle, graph, tensors):
                found.add(needle.tensor)
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
    if content[offset : offset + len(needle.head)] != needle.head or offset < needle.offset:
        return False
    offset -= needle.offset
    tensor = tensors[needle.tensor]
    stored = stored_bytes(graph, tensor)
    whole = _turned(stored, tensor) if needle.turned else stored.tobytes()
    if content[offset : offset + len(whole)] == whole:
        return True
    if needle.turned or not needle.neighbours or needle.neighbours * tensor.dims[0] <= len(whole):
        return False
    rows = stored.reshape(tensor.dims[0], -1)
    if offset + (len(rows) - 1) * needle.neighbours + rows.shape[1] > len(content):
        return False
    beside = np.ndarray(rows.shape, np.uint8, content, offset, (needle.neighbours, 1))
    return np.array_equal(beside, rows)


def _head(graph: Path, tensor: onnx.TensorProto, turn: bool) -> tuple[int, bytes]:
    """Bytes by which a tensor, as written or transposed, is recognised, and how far behind its first byte they are."""
    if turn:
        first = _first_columns(graph, tensor)
        return (0, first) if len(set(first)) >= _DISTINCT else _distinct(_turned(stored_bytes(graph, tensor), tensor))
    stored = stored_bytes(graph, tensor)
    row = len(stored) // tensor.dims[0] if len(tensor.dims) == 2 else _HEAD
    if _WORD <= row < _HEAD:
        return 0, stored[:row].tobytes()
    return _distinct(stored)


def _distinct(stored: np.ndarray | bytes) -> tuple[int, bytes]:
    """The first bytes that are no mere zeros, ones or the like, and where; the very first ones if there are none."""
    for offset in range(0, len(stored) - _HEAD + 1, _HEAD):
        head = bytes(stored[offset : offset + _HEAD])
        if len(set(head)) >= _DISTINCT:
            return offset, head
    return 0, bytes(stored[:_HEAD])


def _first_columns(graph: Path, tensor: onnx.TensorProto) -> bytes:
    """The first bytes of a matrix transposed, for which few of its own are read."""
    stored = stored_bytes(graph, tensor)
    (rows, columns), bits = tensor.dims, _TURNED[tensor.data_type]
    wanted = _HEAD * 8 // bits
    if rows < wanted or columns * bits % 8:
        return _turned(stored, tensor)[:_HEAD]
    if bits == 16:
        return np.ascontiguousarray(stored.view("<u2").reshape(rows, -1)[:wanted, 0]).tobytes()
    column = np.ascontiguousarray(stored.reshape(rows, -1)[:wanted, 0])
    return _pack(_unpack(column.tobytes(), bits, wanted * 8 // bits)[:: 8 // bits], bits)


def _turned(stored: np.ndarray, tensor: onnx.TensorProto) -> bytes:
    """A matrix transposed."""
    from engine_build.packing import transpose, turned

    (rows, columns), bits = tensor.dims, _TURNED[tensor.data_type]
    if bits == 16:
        return turned(stored.view("<i2").reshape(rows, columns)).tobytes()
    if columns * bits % 8 == 0:
        return transpose(stored.reshape(rows, -1), bits, columns)
    return _pack(turned(_unpack(stored.tobytes(), bits, rows * columns).reshape(rows, columns)), bits)


def _pack(codes: np.ndarray, bits: int) -> bytes:
    from calibrator.quantizers.packing import pack

    return pack(codes, bits)


def _unpack(content: bytes, bits: int, count: int) -> np.ndarray:
    from calibrator.quantizers.packing import unpack

    return unpack(content, bits, count)


def stored_length(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor, wherever they are."""
    external = {entry.key: entry.value for entry in tensor.external_data}
    return int(external["length"]) if external else len(tensor.raw_data)


def stored_bytes(graph: Path, tensor: onnx.TensorProto) -> np.ndarray:
    """A tensor's bytes; of long ones only those that are touched are read."""
    external = {entry.key: entry.value for entry in tensor.external_data}
    if not external:
        return np.frombuffer(bytearray(tensor.raw_data), np.uint8)
    path, offset = graph.parent / external["location"], int(external["offset"])
    return np.memmap(path, np.uint8, "c", offset, (int(external["length"]),))
