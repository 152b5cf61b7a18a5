"""A linear layer for TensorRT: the formats that it lacks as plugins, everything else as it has them.

- w2a16, and w4a16 with groups for which TensorRT has no INT4: x [1, tokens, in] -> [1, tokens, out].
- w4a8: `quantize_rows` rounds x per token while it runs, as the calibrator and the CPU do, then integers multiply.

Layers of one input and format, q/k/v or gate/up, are one node with a result for each, and so one launch.

Codes are `pack_runs` words and scales `pack_scales`. Both stand in the engine as they are here: there is no second
packing. Activations are float16.
"""

import functools
import itertools

from engine_build.backends.base import SLAB
from engine_build.backends.tensorrt import linear as plain
from engine_build.backends.tensorrt import plugin_family
from engine_build.backends.tensorrt.kernels import MOST_PARTS, NAMESPACE, Family, node_name
from engine_build.graph.builder import GraphBuilder
from engine_build.packing import pack_runs, pack_scales
from engine_build.weights import LayerWeights

_ALIGNED = 8  # inputs: tokens of float16 that start at whole 16 bytes


def linear(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    """x [1, tokens, in] -> [1, tokens, out], weights in the layer's format, bias added."""
    family = plugin_family(weights.format)
    if family is None:
        return plain.linear(builder, x, weights)
    layer = weights.layer
    codes = builder.tensor(f"{layer.name}.codes", pack_runs(weights.codes, family.weight_bits))
    scales = pack_scales(weights.scales, layer.inputs, weights.format.group_size)
    pad = functools.partial(plain.padded, builder, x, -layer.inputs % _ALIGNED)
    (x,) = tokens = builder.shared("aligned", x, lambda: [pad()])
    if family.rounded:
        write = functools.partial(_nodes, builder, "quantize_rows", [x], 2, f"{layer.name}.input_codes")
        tokens = builder.shared("quantize_rows", x, write)
    result = _product(builder, family, tokens, [codes, builder.tensor(f"{layer.name}.scales", scales)], weights)
    if layer.outputs % SLAB:
        result = builder.slice(result, 0, layer.outputs, 2)
    return plain.with_bias(builder, result, weights)


def _product(builder: GraphBuilder, family: Family, tokens: list[str], matrix: list[str], weights: LayerWeights) -> str:
    """The layer's part of a node that the layers of one input and format share; several nodes where they are many."""
    name, group = weights.layer.name, weights.format.group_size
    write = functools.partial(_nodes, builder, node_name(family, 1), [*tokens, *matrix], 1, name)
    for number in itertools.count():
        (first,) = builder.shared(f"{family.name}_g{group} {number}", tokens[0], write)
        if first == name:
            return name
        node = builder.maker(first)
        if len(node.output) < MOST_PARTS:
            node.input.extend(matrix)
            node.output.append(name)
            node.op_type = node_name(family, len(node.output))
            return name
    raise AssertionError


def _nodes(builder: GraphBuilder, op: str, inputs: list[str], count: int, name: str) -> list[str]:
    """A plugin node; `plugin_namespace` and `aot` are what TensorRT's parser looks it up by."""
    return builder.nodes(op, inputs, count, name, NAMESPACE, plugin_namespace=NAMESPACE, plugin_version="1", aot=1)
