"""A linear layer for TensorRT 10.9 and later: the formats that it lacks as plugins, everything else as it has them.

- w2a16: one node, x [1, tokens, in] -> [1, tokens, out].
- w4a8: `quantize_rows` rounds x per token while it runs, as the calibrator and the CPU do, then integers multiply.

Codes are `pack_runs` words and scales `pack_scales`. Both stand in the engine as they are here: there is no second
packing. Activations are float16.
"""

import functools

from engine_build.backends.base import SLAB
from engine_build.backends.tensorrt import is_plugin
from engine_build.backends.tensorrt import linear as plain
from engine_build.backends.tensorrt.kernels import NAMESPACE
from engine_build.graph.builder import GraphBuilder
from engine_build.packing import pack_runs, pack_scales
from engine_build.weights import LayerWeights

_ALIGNED = 8  # inputs: tokens of float16 that start at whole 16 bytes


def linear(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    """x [1, tokens, in] -> [1, tokens, out], weights in the layer's format, bias added."""
    if not is_plugin(weights.format):
        return plain.linear(builder, x, weights)
    layer, bits = weights.layer, weights.format.weight_bits
    codes = builder.tensor(f"{layer.name}.codes", pack_runs(weights.codes, bits))
    scales = pack_scales(weights.scales, layer.inputs, weights.format.group_size)
    pad = functools.partial(plain.padded, builder, x, -layer.inputs % _ALIGNED)
    (x,) = inputs = builder.shared("aligned", x, lambda: [pad()])
    if bits == 4:
        write = functools.partial(_nodes, builder, "quantize_rows", [x], 2, f"{layer.name}.input_codes")
        inputs = builder.shared("quantize_rows", x, write)
    inputs = [*inputs, codes, builder.tensor(f"{layer.name}.scales", scales)]
    (result,) = _nodes(builder, f"w{bits}a{weights.format.activation_bits}", inputs, 1, layer.name)
    if layer.outputs % SLAB:
        result = builder.slice(result, 0, layer.outputs, 2)
    return plain.with_bias(builder, result, weights)


def _nodes(builder: GraphBuilder, op: str, inputs: list[str], count: int, name: str) -> list[str]:
    """A plugin node; `plugin_namespace` and `aot` are what TensorRT's parser looks it up by."""
    return builder.nodes(op, inputs, count, name, NAMESPACE, plugin_namespace=NAMESPACE, plugin_version="1", aot=1)
