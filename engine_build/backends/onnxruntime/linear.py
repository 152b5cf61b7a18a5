"""A linear layer in any format that ONNX Runtime's CPU provider really runs; see core.backends.onnxruntime.

Inside the file weights are packed and scales are float16. Which kernel runs is decided here, by form; sessions leave
it as it is (core.backends.onnxruntime.session):

- MatMulNBits, bias inside: 4-bit codes in groups at accuracy level 1 (float32 activations), and 8-bit activations in
  groups at level 4.
- 2 and 8 bits with 16-bit activations, and one scale per row: MatMulNBits has no fast float32 kernel for these (ten
  times slower at one row), and fusing per-row scales would copy each of them for every 32 inputs. Codes of rank 3
  [groups, group, out] are not fused; they are dequantized at run time.
- w8a8: dynamic per-token codes and MatMulInteger, unsigned on both sides because the signed kernels saturate on
  processors without VNNI.
"""

import numpy as np
import torch
from onnx import TensorProto

from calibrator.quantizers.packing import pack
from engine_build.graph.builder import GraphBuilder
from engine_build.packing import pack_nbits, pad_groups
from engine_build.weights import LayerWeights

_CODE_TYPES = {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8}
_SMALLEST_PEAK = 1e-30
_TOP = 127.0
_UINT8_ZERO = 128
EXACT, ROUNDED = 1, 4
"""Accuracy levels of MatMulNBits: float32 activations, and int8 ones."""


def linear(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    """x [1, tokens, in] -> [1, tokens, out], weights and arithmetic in the layer's format, bias added."""
    fmt, name = weights.format, weights.layer.name
    if fmt.weight_bits == 16:
        result = builder.node("MatMul", [x, _sixteen_bit(builder, weights)], name)
    elif fmt.group_size and (fmt.activation_bits == 8 or fmt.weight_bits == 4):
        return _nbits(builder, x, weights)
    elif fmt.activation_bits == 16:
        result = builder.node("MatMul", [x, _unfused(builder, x, weights)], name)
    else:
        result = _integer(builder, x, weights)
    if weights.bias is not None:
        result = builder.add(result, builder.tensor(f"{name}.bias", weights.bias))
    return result


def _sixteen_bit(builder: GraphBuilder, weights: LayerWeights) -> str:
    assert weights.rows is not None
    # Of one row the transpose counts as contiguous with strides that do not fit a view of bytes: a copy has its own.
    rows = weights.rows.to(torch.bfloat16).t().clone(memory_format=torch.contiguous_format)
    content = rows.view(torch.uint8).numpy().tobytes()
    stored = builder.raw(f"{weights.layer.name}.weight", TensorProto.BFLOAT16, tuple(rows.shape), content)
    return builder.cast(stored, builder.float_type, f"{weights.layer.name}.weight_float")


def _scales(builder: GraphBuilder, weights: LayerWeights, values: np.ndarray) -> str:
    stored = builder.tensor(f"{weights.layer.name}.scales", np.ascontiguousarray(values))
    return builder.cast(stored, builder.float_type, f"{weights.layer.name}.scales_float")


def _codes(builder: GraphBuilder, weights: LayerWeights, codes: np.ndarray) -> str:
    bits = weights.format.weight_bits
    content = pack(np.ascontiguousarray(codes), bits)
    return builder.raw(f"{weights.layer.name}.codes", _CODE_TYPES[bits], codes.shape, content)


def _unfused(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    layer, name = weights.layer, weights.layer.name
    group = weights.format.group_size or layer.inputs
    blocks = pad_groups(weights.codes, group).transpose(1, 2, 0)
    codes = _codes(builder, weights, blocks)
    scales = builder.mul(_scales(builder, weights, weights.scales.T[:, None, :]), _one(builder, x))
    values = builder.node("DequantizeLinear", [codes, scales], f"{name}.dequantized", axis=1, block_size=group)
    rows = builder.reshape(values, -1, layer.outputs)
    return rows if layer.inputs % group == 0 else builder.slice(rows, 0, layer.inputs, 0)


def _one(builder: GraphBuilder, x: str) -> str:
    """The number 1, known only once `x` is.

    Nodes that depend on constants alone may run at any time, and ONNX Runtime runs them first: every layer's weights
    would lie dequantized in memory at once. Any number to the power of 0 is 1, NaN included.
    """
    first = builder.node("Slice", [x, builder.ints(0, 0, 0), builder.ints(1, 1, 1)])
    return builder.node("Pow", [first, builder.scalar(0.0)])


def _nbits(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    layer, fmt = weights.layer, weights.format
    assert fmt.group_size is not None
    codes = builder.tensor(f"{layer.name}.codes", pack_nbits(weights.codes, fmt.weight_bits, fmt.group_size))
    inputs = [x, codes, _scales(builder, weights, weights.scales.reshape(-1))]
    if weights.bias is not None:
        inputs += ["", "", builder.tensor(f"{layer.name}.bias", weights.bias)]
    return builder.microsoft(
        "MatMulNBits",
        inputs,
        layer.name,
        K=layer.inputs,
        N=layer.outputs,
        bits=fmt.weight_bits,
        block_size=fmt.group_size,
        accuracy_level=ROUNDED if fmt.activation_bits == 8 else EXACT,
    )


def _integer(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    name = weights.layer.name
    peak = builder.node("ReduceMax", [builder.node("Abs", [x]), builder.ints(-1)], keepdims=1)
    scale = builder.mul(builder.node("Max", [peak, builder.scalar(_SMALLEST_PEAK)]), builder.scalar(1 / _TOP))
    rounded = builder.node("Round", [builder.node("Div", [x, scale])])
    unsigned = builder.cast(builder.add(rounded, builder.scalar(_UINT8_ZERO)), TensorProto.UINT8)
    shifted = (weights.codes.T.astype(np.int16) + _UINT8_ZERO).astype(np.uint8)
    codes = builder.tensor(f"{name}.codes", np.ascontiguousarray(shifted))
    zero = builder.constant(_UINT8_ZERO, np.uint8)
    sums = builder.node("MatMulInteger", [unsigned, codes, zero, zero], name)
    scaled = builder.mul(builder.cast(sums, builder.float_type), _scales(builder, weights, weights.scales.reshape(-1)))
    return builder.mul(scaled, scale)
