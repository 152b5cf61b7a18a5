"""A linear layer for TensorRT 10.9 and later: the formats that it lacks as plugins, everything else as it has them.

- w2a16: one node, x [1, tokens, in] -> [1, tokens, out].
- w4a8: `quantize_rows` rounds x per token while it runs, as the calibrator and the CPU do, then integers multiply.

Codes are `pack_runs` words, scales float16 [out, groups], one per row or for every group of the rows filled up to whole
runs. Both stand in the engine as they are here: there is no second packing.
"""

import functools

from engine_build.graph import linear_tensorrt
from engine_build.graph.builder import GraphBuilder
from engine_build.kernels import NAMESPACE
from engine_build.packing import pack_runs, pad_scales
from engine_build.weights import LayerWeights
from vla_policy.core.formats import Format

_ALIGNED = 8  # inputs: rows of 16-bit activations that start at whole 16 bytes
_SCALAR = "f16"


def is_plugin(fmt: Format) -> bool:
    """Whether a layer of this format becomes a plugin."""
    return (fmt.weight_bits, fmt.activation_bits) in ((2, 16), (4, 8))


def linear(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    """x [1, tokens, in] -> [1, tokens, out], weights in the layer's format, bias added."""
    if not is_plugin(weights.format):
        return linear_tensorrt.linear(builder, x, weights)
    name, bits, group = weights.layer.name, weights.format.weight_bits, weights.format.group_size
    codes = builder.tensor(f"{name}.codes", pack_runs(weights.codes, bits))
    scales = builder.tensor(f"{name}.scales", pad_scales(weights.scales, weights.layer.inputs, group))
    if bits == 2:
        inputs = [linear_tensorrt.padded(builder, x, -weights.layer.inputs % _ALIGNED)]
    else:
        write = functools.partial(_nodes, builder, "quantize_rows", [x], 2, f"{name}.input_codes")
        inputs = builder.shared("quantize_rows", x, write)
    (result,) = _nodes(builder, f"w{bits}a{weights.format.activation_bits}", [*inputs, codes, scales], 1, name)
    return linear_tensorrt.with_bias(builder, result, weights)


def _nodes(builder: GraphBuilder, op: str, inputs: list[str], count: int, name: str) -> list[str]:
    """A plugin node; `plugin_namespace` and `aot` are what TensorRT's parser looks it up by."""
    return builder.nodes(
        f"{op}_{_SCALAR}", inputs, count, name, NAMESPACE, plugin_namespace=NAMESPACE, plugin_version="1", aot=1
    )
