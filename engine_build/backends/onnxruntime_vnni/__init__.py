"""ONNX Runtime with this project's own operator for layers with 8-bit activations; all else is as in `onnxruntime`."""

from pathlib import Path

from engine_build.backends.onnxruntime import OnnxRuntime
from engine_build.backends.onnxruntime.linear import linear as portable_linear
from engine_build.backends.onnxruntime_vnni.linear import quantized_linear
from engine_build.graph.builder import GraphBuilder
from engine_build.packing import LANE_INPUTS, LANES
from engine_build.weights import LayerWeights
from vla_policy.core.backends.onnxruntime_vnni import runs_here
from vla_policy.core.backends.onnxruntime_vnni.library import library
from vla_policy.core.formats import Format


class OnnxRuntimeVnni(OnnxRuntime):
    """See the protocol."""

    def library(self) -> Path | None:
        return library()

    def filling(self, fmt: Format) -> tuple[int, int]:
        return (LANES, fmt.group_size or LANE_INPUTS) if runs_here(fmt) else super().filling(fmt)


def linear(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    """x [1, tokens, in] -> [1, tokens, out], weights and arithmetic in the layer's format, bias added."""
    write = quantized_linear if runs_here(weights.format) else portable_linear
    return write(builder, x, weights)


BACKEND = OnnxRuntimeVnni(linear)
