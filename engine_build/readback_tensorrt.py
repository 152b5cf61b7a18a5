"""Which format each layer of a TensorRT engine has, without a GPU: its packed codes, found in the engine's bytes.

An engine can be opened, and TensorRT's inspector asked, only where its GPU is. But weights lie in the serialized engine
as they were given or, if TensorRT knows them as codes, transposed, so a layer whose N-bit codes stand there, byte for
byte, was built with N bits. 16-bit weights may be merged or re-ordered by the builder; for those the absence of the
policy's tensors proves nothing, and they are reported as built, not as found.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from engine_build.packing import pack, unpack
from engine_build.readback import Realised, canonical
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
    """How one layer's codes begin in one of the two orders."""

    layer: str
    transposed: bool
    head: bytes


def read_back(
    graph: Path, engine: Path, layers: Mapping[str, Layer], planned: Mapping[str, Format]
) -> dict[str, Realised]:
    """The format of each of `layers` in `engine`, built from `graph`. Raises ArtefactError for codes not found."""
    tensors = {tensor.name: tensor for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer}
    quantized = {name for name in layers if f"{name}.codes" in tensors}
    with open(engine, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = _search(content, graph, tensors, sorted(quantized))
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


def _search(content: mmap.mmap, graph: Path, tensors: Mapping[str, onnx.TensorProto], names: list[str]) -> set[str]:
    """The layers whose codes stand in `content`, at any multiple of four bytes."""
    needles: dict[int, list[_Needle]] = {}
    for name in names:
        for transposed in (False, True) if tensors[f"{name}.codes"].data_type in _BITS else (False,):
            head = _ordered(graph, tensors[f"{name}.codes"], transposed)[:_HEAD]
            needles.setdefault(int.from_bytes(head[:_WORD], "little"), []).append(_Needle(name, transposed, head))
    found: set[str] = set()
    keys = np.array(sorted(needles), np.uint64)
    for start in range(0, len(content), _CHUNK):
        for phase in range(0, _WORD, _ALIGNMENT):
            chunk = content[start + phase : start + phase + _CHUNK]
            words = np.frombuffer(chunk[: len(chunk) // _WORD * _WORD], "<u8")
            for place in np.flatnonzero(np.isin(words, keys)):
                offset = start + phase + int(place) * _WORD
                for needle in needles[int(words[place])]:
                    if needle.layer not in found and _stands_at(content, offset, needle, graph, tensors):
                        found.add(needle.layer)
    return found


def _stands_at(
    content: mmap.mmap, offset: int, needle: _Needle, graph: Path, tensors: Mapping[str, onnx.TensorProto]
) -> bool:
    if content[offset : offset + len(needle.head)] != needle.head:
        return False
    whole = _ordered(graph, tensors[f"{needle.layer}.codes"], needle.transposed)
    return content[offset : offset + len(whole)] == whole


def _ordered(graph: Path, tensor: onnx.TensorProto, transposed: bool) -> bytes:
    """The codes as written, [in, out], or transposed."""
    content = _content(graph, tensor)
    if not transposed:
        return content
    rows, columns = tensor.dims
    bits = _BITS[tensor.data_type]
    codes = unpack(content, bits, rows * columns).reshape(rows, columns)
    return pack(np.ascontiguousarray(codes.T), bits)


def _content(graph: Path, tensor: onnx.TensorProto) -> bytes:
    external = {entry.key: entry.value for entry in tensor.external_data}
    if not external:
        return tensor.raw_data
    with open(graph.parent / external["location"], "rb") as stream:
        stream.seek(int(external["offset"]))
        return stream.read(int(external["length"]))
