"""A linear layer for TensorRT and TensorRT-RTX: a strongly typed network in float16, precision written out as Q/DQ.

- 16 bits: float16 weights.
- w8a16: INT8 codes, one scale per output channel.
- w8a8: the same weights; activations as INT8 with one fixed scale per tensor, largest input / 127. (A CPU has one per
  token at run time, for which TensorRT has no integer kernel.)
- w4a16: INT4 codes in blocks along the inputs, or one scale per channel as a single block.
- w2a16: TensorRT has no 2-bit type. Two codes share one INT4, v = 4 high + (low + 2), and are split in the network:
  high = floor(v / 4), low = v - 4 high - 2. The engine holds 2 bits per weight; the split costs time at every run. The
  INT4 has one scale, 1, per tensor, which is legal in TensorRT-RTX only: TensorRT has blocks of 64 or 128.

Blocks must be whole, so a ragged last group is filled up with zero codes, and the input with zeros.
"""

import numpy as np
from onnx import TensorProto

from calibrator.quantizers.activations import fixed_step
from calibrator.quantizers.packing import pack
from engine_build.backends.tensorrt import has_fixed_scale
from engine_build.graph.builder import GraphBuilder
from engine_build.packing import pad_groups, turned
from engine_build.weights import LayerWeights


def linear(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    """x [1, tokens, in] -> [1, tokens, out], weights in the layer's format, bias added."""
    name, bits = weights.layer.name, weights.format.weight_bits
    if bits == 16:
        assert weights.rows is not None
        kernel = builder.tensor(f"{name}.weight", weights.rows.float().numpy().T, np.float16)
    else:
        group = weights.format.group_size or weights.layer.inputs
        group += group % 2 if bits == 2 else 0  # codes are paired
        if has_fixed_scale(weights.format):
            x = _rounded(builder, x, weights)
        x = padded(builder, x, -weights.layer.inputs % group)
        kernel = {8: _eight_bit, 4: _four_bit, 2: _two_bit}[bits](builder, weights, group)
    return with_bias(builder, builder.node("MatMul", [x, kernel], name), weights)


def with_bias(builder: GraphBuilder, result: str, weights: LayerWeights) -> str:
    """`result` plus the layer's bias, if it has one."""
    if weights.bias is None:
        return result
    return builder.add(result, builder.tensor(f"{weights.layer.name}.bias", weights.bias, np.float16))


def _rounded(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    """Q/DQ of the input, which TensorRT joins with the weight's DQ into an INT8 product."""
    assert weights.input_peak is not None
    name = weights.layer.name
    scale = builder.scalar(fixed_step(name, weights.input_peak, weights.format))
    codes = builder.node("QuantizeLinear", [x, scale, builder.constant(0, np.int8)], f"{name}.input_codes")
    return builder.node("DequantizeLinear", [codes, scale, builder.constant(0, np.int8)], f"{name}.input_rounded")


def padded(builder: GraphBuilder, x: str, missing: int) -> str:
    """`x` [1, tokens, in] with that many zeros behind its last input."""
    if missing == 0:
        return x
    return builder.node("Pad", [x, builder.ints(0, 0, 0, 0, 0, missing), builder.scalar(0.0)])


def _columns(weights: LayerWeights, group: int) -> np.ndarray:
    """Codes [in, out], filled up to whole groups."""
    return turned(pad_groups(weights.codes, group).reshape(weights.layer.outputs, -1))


def _eight_bit(builder: GraphBuilder, weights: LayerWeights, group: int) -> str:
    name = weights.layer.name
    codes = _columns(weights, group)
    stored = builder.raw(f"{name}.codes", TensorProto.INT8, codes.shape, codes.tobytes())
    scales = builder.tensor(f"{name}.scales", np.ascontiguousarray(weights.scales[:, 0]))
    return builder.node("DequantizeLinear", [stored, scales], f"{name}.dequantized", axis=1)


def _four_bit(builder: GraphBuilder, weights: LayerWeights, group: int) -> str:
    name = weights.layer.name
    codes = _columns(weights, group)
    stored = builder.raw(f"{name}.codes", TensorProto.INT4, codes.shape, pack(codes, 4))
    scales = builder.tensor(f"{name}.scales", np.ascontiguousarray(weights.scales.T))
    return builder.node("DequantizeLinear", [stored, scales], f"{name}.dequantized", axis=0, block_size=group)


def _two_bit(builder: GraphBuilder, weights: LayerWeights, group: int) -> str:
    name, outputs = weights.layer.name, weights.layer.outputs
    high, low = np.split(_columns(weights, group), 2)
    pairs = (4 * high + low + 2).astype(np.int8)
    stored = builder.raw(f"{name}.codes", TensorProto.INT4, pairs.shape, pack(pairs, 4))
    values = builder.node("DequantizeLinear", [stored, builder.scalar(1.0)], f"{name}.dequantized")
    upper = builder.node("Floor", [builder.mul(values, builder.scalar(0.25))])
    lower = builder.node(
        "Sub", [builder.node("Sub", [values, builder.mul(upper, builder.scalar(4.0))]), builder.scalar(2.0)]
    )
    blocks = builder.reshape(builder.concat([upper, lower], axis=0), -1, group, outputs)
    scales = builder.tensor(f"{name}.scales", np.ascontiguousarray(weights.scales.T[:, None, :]))
    return builder.reshape(builder.mul(blocks, scales), -1, outputs)
