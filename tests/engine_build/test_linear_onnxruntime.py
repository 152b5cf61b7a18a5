"""One layer in every CPU format against the calibrator's simulated quantization and against integers in NumPy."""

import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import rounding
import torch
from choices import with_every_code
from onnx import TensorProto, helper

from calibrator.quantizers.activations import quantize_activation
from engine_build.backends.base import canonical
from engine_build.backends.onnxruntime.linear import linear
from engine_build.backends.onnxruntime.readback import read_back
from engine_build.graph.builder import GraphBuilder
from engine_build.weights import Layer, LayerWeights
from vla_policy.core.backends.onnxruntime.session import open_session, session_options
from vla_policy.core.formats import Format
from vla_policy.core.targets import find_target

INPUTS, OUTPUTS = 150, 40
ROWS = (1, 7, 290)
"""Single rows, few and many run on kernels of their own."""
LAYER = Layer("stack.layer", "linear", "stack.layer", OUTPUTS, INPUTS, bias=True)


def random_layer(fmt: Format, inputs: int = INPUTS) -> tuple[LayerWeights, torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(5)
    weight = (torch.randn(OUTPUTS, inputs, generator=generator) / inputs**0.5).to(torch.bfloat16)
    bias = torch.randn(OUTPUTS, generator=generator).numpy()
    layer = replace(LAYER, inputs=inputs)
    if fmt.weight_bits == 16:
        return LayerWeights(layer, fmt, None, weight, bias), weight.float(), bias
    quantized = with_every_code(weight, fmt)
    return LayerWeights(layer, fmt, quantized, None, bias), quantized.dequantize(), bias


def write_graph(path: Path, weights: LayerWeights) -> None:
    with GraphBuilder(path) as builder:
        builder.rename(linear(builder, "x", weights), "y")
        x, y = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", size])
            for name, size in (("x", weights.layer.inputs), ("y", OUTPUTS))
        )
        builder.save([x], [y])
    onnx.checker.check_model(str(path))


@pytest.mark.parametrize("fmt", find_target("cpu").legal(), ids=str)
def test_layer_equals_simulated_quantization_and_is_read_back(fmt: Format, tmp_path: Path) -> None:
    weights, values, bias = random_layer(fmt)
    write_graph(tmp_path / "layer.onnx", weights)
    session = open_session(tmp_path / "layer.onnx", session_options(1))
    for rows in ROWS:
        x = between_ties(torch.randn(1, rows, INPUTS, generator=torch.Generator().manual_seed(6)), fmt.group_size)
        (y,) = session.run(None, {"x": x.numpy()})
        seen = x.numpy() if fmt.activation_bits == 16 else by_hand(x, fmt.group_size or INPUTS)
        expected = seen.astype(np.float64) @ values.double().numpy().T + bias
        # Kernels multiply by the scales of weights and activations inside the sum or after it: two roundings more.
        allowed = rounding.of_products(seen, values.numpy(), bias, further=2)
        assert (np.abs(y - expected) <= allowed).all(), rows
        assert allowed.max() < 0.1 * np.abs(by_hand(x, 32) - x.numpy()).max(), "finer than int8's rounding"
    realised = read_back(tmp_path / "layer.onnx", {LAYER.name: LAYER}, tmp_path)[LAYER.name]
    assert realised.format == canonical(fmt, INPUTS)


def between_ties(x: torch.Tensor, group: int | None) -> torch.Tensor:
    """`x` with no value near the middle of two int8 codes, where the last bit of a quotient decides for one of them.

    Some kernels divide by the scale and others multiply by its reciprocal.
    """
    size = group or x.shape[-1]
    grouped = torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    scales = grouped.abs().amax(-1, keepdim=True) / 127
    codes = grouped / scales
    near = (codes - codes.floor() - 0.5).abs() < 1e-3
    return torch.where(near, (codes.floor() + 0.4) * scales, grouped).flatten(-2)[..., : x.shape[-1]]


def by_hand(x: torch.Tensor, group: int) -> np.ndarray:
    """Float64 of int8 codes with one scale per token and group, in NumPy's float32."""
    size, values = x.shape[-1], x.numpy()
    rounded = []
    for part in np.split(values, range(group, size, group), axis=-1):
        peak = np.abs(part).max(-1, keepdims=True)
        rounded.append(np.rint(part * (np.float32(127) / peak)).astype(np.float64) * (peak / np.float32(127)))
    return np.concatenate(rounded, axis=-1)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the rule was read off MLAS on x86-64")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_calibrator_rounds_activations_exactly_as_matmulnbits(
    bits: int, group: int, rows: int, tmp_path: Path
) -> None:
    """On values all near the middle of two codes, where the last bit of a quotient decides."""
    weights, values, bias = random_layer(Format(bits, 8, group), 256)
    write_graph(tmp_path / "layer.onnx", weights)
    generator = torch.Generator().manual_seed(7)
    peaks = torch.rand(1, rows, 256 // group, 1, generator=generator) + 0.5
    codes = torch.randint(-127, 127, (1, rows, 256 // group, group), generator=generator) + 0.5
    x = codes * (peaks / 127)
    x[..., :1] = peaks
    x[0, 0, 0] = 0  # a group of zeros has no scale
    (y,) = open_session(tmp_path / "layer.onnx", session_options(1)).run(None, {"x": x.flatten(2).numpy()})

    def misses(seen: torch.Tensor) -> int:
        rounded = seen.flatten(2).numpy()
        allowed = rounding.of_products(rounded, values.numpy(), bias, further=4)
        return int((np.abs(y - (rounded.astype(np.float64) @ values.double().numpy().T + bias)) > allowed).sum())

    assert misses(quantize_activation(x.flatten(2), 8, group)) == 0
    assert misses(quantize_activation(x, 8)) > 0, "dividing by the scale instead gives other codes, and is seen"


def test_sixteen_bit_activations_are_not_rounded_to_int8(tmp_path: Path) -> None:
    """At ONNX Runtime's default accuracy level 4 this fails: the layer would be w4a8 behind the plan's back."""
    weights, values, bias = random_layer(Format(4, 16, 32))
    write_graph(tmp_path / "layer.onnx", weights)
    x = np.random.default_rng(0).standard_normal((1, 1, INPUTS)).astype(np.float32)
    (y,) = open_session(tmp_path / "layer.onnx", session_options(1)).run(None, {"x": x})
    error = np.abs(y - (x.astype(np.float64) @ values.double().numpy().T + bias)).max()
    int8_error = np.abs((by_hand(torch.from_numpy(x), 32) - x.astype(np.float64)) @ values.double().numpy().T).max()
    assert error < int8_error / 1000
