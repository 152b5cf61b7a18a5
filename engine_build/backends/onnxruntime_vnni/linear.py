"""A layer as the operator `QuantizedLinear` of core.backends.onnxruntime_vnni, and how it is found again."""

import numpy as np

from engine_build.backends.onnxruntime.linear import linear as portable_linear
from engine_build.graph.builder import GraphBuilder
from engine_build.packing import pack_lane_scales, pack_lanes
from engine_build.weights import LayerWeights
from vla_policy.core.backends.onnxruntime_vnni import runs_here
from vla_policy.core.backends.onnxruntime_vnni.library import DOMAIN


def linear(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    """x [1, tokens, in] -> [1, tokens, out], weights and arithmetic in the layer's format, bias added."""
    write = quantized_linear if runs_here(weights.format) else portable_linear
    return write(builder, x, weights)


def quantized_linear(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    """x [1, tokens, in] -> [1, tokens, out], in a format with 8-bit activations; the bias is the operator's own."""
    layer, fmt, name = weights.layer, weights.format, weights.layer.name
    inputs = [
        x,
        builder.tensor(f"{name}.codes", pack_lanes(weights.codes, fmt.weight_bits, fmt.group_size)),
        builder.tensor(f"{name}.scales", pack_lane_scales(weights.scales)),
    ]
    if weights.bias is not None:
        inputs.append(builder.tensor(f"{name}.bias", weights.bias, np.float32))
    sizes = {"K": layer.inputs, "N": layer.outputs, "bits": fmt.weight_bits, "block_size": fmt.group_size or 0}
    return builder.node("QuantizedLinear", inputs, name, DOMAIN, **sizes)
