"""Policy and plan to ONNX: the two graphs, their weights packed as planned, streamed to disk layer by layer."""

from collections.abc import Callable, Mapping
from pathlib import Path

from onnx import TensorProto, helper

from calibrator.quantizers import Codes
from engine_build.graph import decoder, vision
from engine_build.graph.builder import OPSET, GraphBuilder
from engine_build.graph.context import GraphContext, LinearWriter
from engine_build.weights import Layer, Tensors
from vla_policy.core.formats import Choice
from vla_policy.core.manifest import GraphSpec, TensorSpec
from vla_policy.core.policy_config import PolicyConfig

_ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}
_ARCHITECTURES = {"vision": vision.build, "decoder": decoder.build}


def export(
    folder: Path,
    config: PolicyConfig,
    tensors: Tensors,
    layers: Mapping[str, Layer],
    assignment: Mapping[str, Choice],
    codes: Codes,
    write_linear: LinearWriter,
    on_layer: Callable[[Layer], None],
    float_type: int = TensorProto.FLOAT,
    opset: int = OPSET,
    input_peaks: Mapping[str, float] | None = None,
) -> dict[str, GraphSpec]:
    """Writes `vision.onnx` and `decoder.onnx`, each with its `.data`, into `folder`; same input, same bytes."""
    graphs = {}
    for name, build in _ARCHITECTURES.items():
        with GraphBuilder(folder / f"{name}.onnx", float_type, opset) as builder:
            context = GraphContext(
                builder, tensors, layers, assignment, codes, write_linear, on_layer, input_peaks or {}
            )
            inputs, outputs = build(context, config)
            builder.save([_info(spec) for spec in inputs], [_info(spec) for spec in outputs])
        graphs[name] = GraphSpec(f"{name}.onnx", tuple(inputs), tuple(outputs))
    return graphs


def _info(spec: TensorSpec) -> "helper.ValueInfoProto":
    return helper.make_tensor_value_info(spec.name, _ONNX_TYPES[spec.dtype], list(spec.shape))
