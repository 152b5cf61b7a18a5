"""A linear layer as the operator that the robot's side turns into OpenVINO's; see core.backends.openvino.graphs."""

import numpy as np
import torch
from onnx import TensorProto

from calibrator.quantizers.packing import pack
from engine_build.graph.builder import GraphBuilder
from engine_build.packing import pad_groups
from engine_build.weights import LayerWeights
from vla_policy.core.backends.openvino.graphs import DOMAIN, LINEAR, TWO_BIT_ZERO

RUN = 32
"""Inputs to whose multiples rows are filled up. Others OpenVINO unpacks on processors with AMX, and multiplies wrongly
at 2 bits on those without AVX-512."""


def linear(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    """x [1, tokens, in] -> [1, tokens, out], weights in the layer's format, bias added."""
    layer, fmt, name = weights.layer, weights.format, weights.layer.name
    if weights.quantized is None:
        assert weights.rows is not None
        content = weights.rows.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
        stored = builder.raw(f"{name}.weight", TensorProto.BFLOAT16, (layer.outputs, layer.inputs), content)
        result = builder.node(LINEAR, [x, stored], name, DOMAIN, bits=16)
    else:
        groups = pad_groups(weights.codes, fmt.group_size or -(-layer.inputs // RUN) * RUN)
        shift = TWO_BIT_ZERO if fmt.weight_bits == 2 else 0
        packed = np.frombuffer(pack(np.ascontiguousarray(groups + np.int8(shift)), fmt.weight_bits), np.uint8)
        ends = [builder.tensor(f"{name}.codes", packed), builder.tensor(f"{name}.scales", weights.scales)]
        columns = groups.shape[1] * groups.shape[2]
        result = builder.node(LINEAR, [x, *ends], name, DOMAIN, bits=fmt.weight_bits, columns=columns)
    return result if weights.bias is None else builder.add(result, builder.tensor(f"{name}.bias", weights.bias))
