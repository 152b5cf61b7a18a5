"""Which format each layer of an ONNX Runtime engine really has: read from the graph after its optimisations."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto

from engine_build.backends.base import Layer, Realised, canonical
from vla_policy.core.backends.base import MEMORY_ONLY
from vla_policy.core.backends.onnxruntime.session import open_session, session_options
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION, Format

_BITS = {TensorProto.INT2: 2, TensorProto.INT4: 4, TensorProto.INT8: 8, TensorProto.UINT8: 8}
_ITEM_BITS = _BITS | {TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16}
_FLOATS = (TensorProto.FLOAT, TensorProto.BFLOAT16)


class _Optimised:
    """A session's graph after optimisation, indexed."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(str(path), load_external_data=False)
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers = {output: node for node in model.graph.node for output in node.output}
        self.by_name = {node.name: node for node in model.graph.node}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for value in node.input:
                self.users.setdefault(value, []).append(node)

    def bytes_of(self, *names: str) -> int:
        """Size of initialisers in memory."""
        total = 0
        for name in names:
            tensor = self.tensors[name]
            count = 1
            for dim in tensor.dims:
                count *= dim
            total += -(-count * _ITEM_BITS[tensor.data_type] // 8)
        return total


def read_back(
    graph: Path, layers: Mapping[str, Layer], scratch: Path, library: Path | None = None
) -> dict[str, Realised]:
    """Optimises `graph` as the runner will and reports each of `layers`. Raises ArtefactError for one not found.

    scratch: a folder for the optimised graph, which does not stay. library: of custom operators.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix="readback.") as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = session_options(library=library)
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        open_session(graph, options)
        built = _Optimised(optimised)
        return {name: _realised(built, layer, graph) for name, layer in layers.items()}


def _realised(built: _Optimised, layer: Layer, graph: Path) -> Realised:
    finders = (_own, _nbits, _dequantized, _integer, _plain)
    for finder in finders:
        found = finder(built, layer)
        if found is not None:
            return found
    raise ArtefactError(f"{graph}: layer {layer.name} is not in the optimised graph; the format cannot be proven")


def _attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _own(built: _Optimised, layer: Layer) -> Realised | None:
    node = built.by_name.get(layer.name)
    if node is None or node.op_type != "QuantizedLinear":
        return None
    values = _attributes(node)
    fmt = Format(values["bits"], 8, values["block_size"] or None)
    shared = "per token and group" if fmt.group_size else "per token"
    arithmetic = f"QuantizedLinear (VNNI, AMX), int8 activations {shared}"
    return Realised(canonical(fmt, layer.inputs), arithmetic, built.bytes_of(*node.input[1:3]))


def _nbits(built: _Optimised, layer: Layer) -> Realised | None:
    node = built.by_name.get(layer.name)
    if node is None or node.op_type != "MatMulNBits":
        return None
    values = _attributes(node)
    exact = values["accuracy_level"] == 1
    fmt = Format(values["bits"], 16 if exact else 8, values["block_size"])
    kind = "float32 activations" if exact else "int8 activations per token and group"
    return Realised(canonical(fmt, layer.inputs), f"MatMulNBits, {kind}", built.bytes_of(*node.input[1:3]))


def _dequantized(built: _Optimised, layer: Layer) -> Realised | None:
    node = built.by_name.get(f"{layer.name}.dequantized")
    if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in built.tensors:
        return None
    fmt = Format(_BITS[built.tensors[node.input[0]].data_type], 16, _attributes(node)["block_size"])
    resident = built.bytes_of(node.input[0], f"{layer.name}.scales_float")
    arithmetic = f"DequantizeLinear at run time, float32 MatMul: {MEMORY_ONLY}"
    return Realised(canonical(fmt, layer.inputs), arithmetic, resident)


def _integer(built: _Optimised, layer: Layer) -> Realised | None:
    node = next((n for n in built.users.get(f"{layer.name}.codes", []) if n.op_type == "MatMulInteger"), None)
    if node is None:
        return None
    scales = next(name for name in built.tensors if name.startswith(f"{layer.name}.scales"))
    activation = built.makers[node.input[0]]
    bits = 8 if activation.op_type == "Cast" else 16
    return Realised(Format(8, bits), "MatMulInteger, per-token int8 activations", built.bytes_of(node.input[1], scales))


def _plain(built: _Optimised, layer: Layer) -> Realised | None:
    name = next((name for name in built.tensors if name.startswith(f"{layer.name}.weight")), None)
    if name is None or built.tensors[name].data_type not in _FLOATS:
        return None
    return Realised(FULL_PRECISION, "float32 MatMul", built.bytes_of(name))
