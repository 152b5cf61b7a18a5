"""Round-to-nearest codes against the rule written out as loops, and contexts that restore."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from calibrator.quantizers.quantization import (
    levels,
    quantize_activation,
    quantize_policy,
    quantize_weight,
    quantized,
    quantized_units,
)
from vla_policy.core.errors import PolicyError
from vla_policy.core.formats import Format

TOP = {2: 2, 3: 3, 4: 7, 8: 127}
RANGE = {2: (-2, 1), 3: (-3, 3), 4: (-7, 7), 8: (-127, 127)}


def by_hand(row: list[float], bits: int, size: int, half_scales: bool = True) -> list[float]:
    """The rule of the module's docstring, one weight at a time, in double precision."""
    result = []
    for start in range(0, len(row), size):
        group = row[start : start + size]
        peak = max(abs(value) for value in group)
        scale = peak / TOP[bits] if peak else 1.0
        scale = float(np.float16(scale)) if half_scales else scale
        low, high = RANGE[bits]
        result += [min(max(round(value / scale), low), high) * scale for value in group]
    return result


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 8, 5])
def test_weights_follow_the_rule(bits: int, group: int | None) -> None:
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(bits))
    quantized_weight = quantize_weight(weight, Format(bits, 16, group))
    expected = torch.tensor([by_hand(row, bits, group or 24) for row in weight.tolist()])
    torch.testing.assert_close(quantized_weight.dequantize(), expected, rtol=1e-6, atol=1e-7)
    assert quantized_weight.codes.dtype == torch.int8
    assert quantized_weight.scales.shape == (6, math.ceil(24 / group) if group else 1)
    assert int(quantized_weight.codes.min()) >= RANGE[bits][0]
    assert int(quantized_weight.codes.max()) <= RANGE[bits][1]


def test_convolution_is_its_linear_equivalent() -> None:
    conv = nn.Conv2d(3, 8, 4, stride=4)
    linear = nn.Linear(48, 8)
    linear.weight.data = conv.weight.data.flatten(1)
    fmt = Format(4, 16, 16)
    assert torch.equal(
        quantize_weight(conv.weight, fmt).dequantize().flatten(1), quantize_weight(linear.weight, fmt).dequantize()
    )


def test_zero_weights_stay_zero() -> None:
    assert torch.equal(quantize_weight(torch.zeros(2, 8), Format(2)).dequantize(), torch.zeros(2, 8))


def test_error_is_at_most_half_a_step_except_the_clipped_2_bit_peak() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    for bits in (3, 4, 8):
        result = quantize_weight(weight, Format(bits, 16, 64))
        assert bool(((result.dequantize() - weight).abs() <= result.scales / 2 * (1 + 1e-5)).all())
    result = quantize_weight(weight, Format(2, 16, 64))
    assert bool(((result.dequantize() - weight).abs() <= result.scales * (1 + 2e-3)).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_rounded_per_token_and_pass_gradients(bits: int) -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3), requires_grad=True)
    y = quantize_activation(x, bits)
    expected = torch.tensor([[by_hand(token, bits, 16, half_scales=False) for token in batch] for batch in x.tolist()])
    torch.testing.assert_close(y.detach(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad((y * torch.arange(16.0)).sum(), x)
    assert torch.equal(gradient, torch.arange(16.0).expand(2, 5, 16))


def test_patches_of_a_convolution_are_its_tokens() -> None:
    conv = nn.Conv2d(3, 4, 4, stride=4, bias=False)
    image = torch.randn(2, 3, 8, 12)
    with torch.no_grad(), quantized(nn.Sequential(conv), "0", Format(16, 4)):
        got = conv(image)
    columns = nn.functional.unfold(image, 4, stride=4).transpose(1, 2)
    expected = quantize_activation(columns, 4) @ conv.weight.detach().flatten(1).T
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), expected)


def test_context_restores_bit_for_bit_even_on_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    before = model(x)
    with pytest.raises(RuntimeError, match="stop"), quantized_units(model, {"0": Format(2, 4), "1": Format(4, 8)}):
        assert not torch.equal(model(x), before)
        raise RuntimeError("stop")
    assert torch.equal(model(x), before)


def test_permanent_quantization_equals_the_context() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    plan = {"0": Format(2, 8, 4), "1": Format(8, 16)}
    with quantized_units(model, plan):
        expected = model(x)
    quantize_policy(model, plan)
    assert torch.equal(model(x), expected)


def test_errors_name_the_layer_or_width() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    with pytest.raises(PolicyError, match="no layer '7'"), quantized(model, "7", Format(4)):
        pass
    with pytest.raises(PolicyError, match="'1' is a GELU"), quantized(model, "1", Format(4)):
        pass
    with pytest.raises(PolicyError, match="5-bit codes"):
        levels(5)
    with pytest.raises(PolicyError, match="not finite"):
        quantize_weight(torch.tensor([[1.0, float("nan")]]), Format(4))
