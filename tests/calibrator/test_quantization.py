"""Round-to-nearest codes against the rule written out as loops, and contexts that restore."""

import math

import numpy as np
import pytest
import torch
from choices import rtn
from rounding import SINGLE, of_products
from torch import nn

from calibrator.quantizers import (
    InputScale,
    InputScales,
    find_layer,
    parse_choice,
    quantize,
    quantize_policy,
    quantized,
)
from calibrator.quantizers.activations import input_rows, quantize_activation, quantize_input
from calibrator.quantizers.weights import code_range
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.formats import FULL, Choice, Format, Recipe, Rounding
from vla_policy.core.targets import find_target

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
    quantized_weight = quantize(weight, rtn(Format(bits, 16, group)))
    expected = torch.tensor([by_hand(row, bits, group or 24) for row in weight.tolist()])
    # One product in float32: the scale is a float16 number, and no code is near a tie.
    torch.testing.assert_close(quantized_weight.dequantize(), expected, rtol=SINGLE, atol=0)
    assert quantized_weight.codes.dtype == torch.int8
    assert quantized_weight.scales.shape == (6, math.ceil(24 / group) if group else 1)
    assert int(quantized_weight.codes.min()) >= RANGE[bits][0]
    assert int(quantized_weight.codes.max()) <= RANGE[bits][1]


def test_convolution_is_its_linear_equivalent() -> None:
    conv = nn.Conv2d(3, 8, 4, stride=4)
    linear = nn.Linear(48, 8)
    linear.weight.data = conv.weight.data.flatten(1)
    choice = parse_choice("w4a16_g16")
    assert torch.equal(
        quantize(conv.weight, choice).dequantize().flatten(1), quantize(linear.weight, choice).dequantize()
    )


def test_zero_weights_stay_zero() -> None:
    assert torch.equal(quantize(torch.zeros(2, 8), rtn(Format(2))).dequantize(), torch.zeros(2, 8))


def test_error_is_at_most_half_a_step_except_the_clipped_2_bit_peak() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    for bits in (3, 4, 8):
        result = quantize(weight, rtn(Format(bits, 16, 64)))
        assert bool(((result.dequantize() - weight).abs() <= result.scales / 2 * (1 + 1e-5)).all())
    result = quantize(weight, rtn(Format(2, 16, 64)))
    assert bool(((result.dequantize() - weight).abs() <= result.scales * (1 + 2e-3)).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_rounded_per_token_and_pass_gradients(bits: int) -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3), requires_grad=True)
    y = quantize_activation(x, bits)
    expected = torch.tensor([[by_hand(token, bits, 16, half_scales=False) for token in batch] for batch in x.tolist()])
    # A quotient and a product in float32, and x + (rounded - x) beside them.
    torch.testing.assert_close(y.detach(), expected, rtol=4 * SINGLE, atol=4 * SINGLE)
    (gradient,) = torch.autograd.grad((y * torch.arange(16.0)).sum(), x)
    assert torch.equal(gradient, torch.arange(16.0).expand(2, 5, 16))


@pytest.mark.parametrize("layer", [nn.Linear(16, 4), nn.Conv2d(4, 4, 2, stride=2)])
def test_a_fixed_scale_is_the_engine_s_number_for_every_value(layer: nn.Module) -> None:
    """ONNX's QuantizeLinear in NumPy: ties to even, what lies beyond the scale clipped to all of two's complement."""
    fmt, target = Format.parse("w8a8"), find_target("orin-jp7")
    peak = 3.7
    scale = InputScales(target, {"layer": peak}).of("layer", fmt)
    step = np.float16(np.float32(peak / 127)).astype(np.float32)
    assert scale == InputScale(Rounding.TENSOR, float(step))
    x = torch.randn(2, 4, 6, 16, generator=torch.Generator().manual_seed(3)) * 2
    x[0, 0, 0, :4] = torch.tensor([2.5, 3.5, -128.0, 127.0]) * float(step)
    x.requires_grad_()
    got = quantize_input(layer, x, fmt, scale)
    expected = np.clip(np.rint(x.detach().numpy() / step), -128, 127) * step
    assert expected.min() == -128 * step and expected.max() == 127 * step, "both ends are clipped to"
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=4 * SINGLE, atol=4 * SINGLE)
    np.testing.assert_array_equal(np.rint(got.detach().numpy()[0, 0, 0, :4] / step), [2, 4, -128, 127])
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


def test_fixed_scales_that_are_not_known_are_refused_by_the_layer() -> None:
    fmt, scales = Format.parse("w8a8"), InputScales(find_target("orin-jp7"), {"zero": 0.0, "huge": 1e8})
    with pytest.raises(ArtefactError, match=r"^other in w8a8: orin-jp7 rounds its input with one fixed scale, and"):
        scales.of("other", fmt)
    for unit, peak in (("zero", "0"), ("huge", r"1e\+08")):
        with pytest.raises(ArtefactError, match=rf"^{unit} in w8a8: inputs up to {peak} have no scale in float16"):
            scales.of(unit, fmt)
    assert scales.of("other", Format.parse("w4a8_g64")) == InputScale(), "our kernel rounds per token"
    assert InputScales().of("other", fmt) == InputScale()
    assert InputScales(find_target("cpu")).of("other", Format.parse("w8a8_g64")) == InputScale(Rounding.GROUP)


def test_patches_of_a_convolution_are_its_tokens() -> None:
    conv = nn.Conv2d(3, 4, 4, stride=4, bias=False)
    image = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(4))
    with torch.no_grad(), quantized(nn.Sequential(conv), "0", parse_choice("w16a4")):
        got = conv(image)
    columns = nn.functional.unfold(image, 4, stride=4).transpose(1, 2)
    expected = quantize_activation(columns, 4) @ conv.weight.detach().flatten(1).T
    allowed = of_products(quantize_activation(columns, 4).numpy(), conv.weight.detach().flatten(1).numpy())
    assert (np.abs((got.flatten(2).transpose(1, 2) - expected).numpy()) <= 2 * allowed).all(), "both are rounded"


def test_rows_of_a_convolution_are_its_patches() -> None:
    conv, image = nn.Conv2d(3, 4, (4, 2), stride=(4, 2)), torch.randn(2, 3, 8, 12)
    columns = nn.functional.unfold(image, (4, 2), stride=(4, 2)).transpose(1, 2)
    torch.testing.assert_close(input_rows(conv, image), columns.flatten(0, 1))
    with pytest.raises(PolicyError, match="overlapping patches"):
        input_rows(nn.Conv2d(3, 4, 3, stride=1), image)


def test_context_restores_bit_for_bit_even_on_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    before = model(x)
    with pytest.raises(RuntimeError, match="stop"), quantized(model, "0", parse_choice("w2a4")):
        assert not torch.equal(model(x), before)
        raise RuntimeError("stop")
    assert torch.equal(model(x), before)


def test_permanent_quantization_equals_the_context() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    plan = {"0": parse_choice("w2a8_g4"), "1": FULL}
    with quantized(model, "0", plan["0"]):
        expected = model(x)
    quantize_policy(model, plan)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("deviation", [5e-4, 1e-6])
def test_small_weights_keep_their_digits(deviation: float) -> None:
    """Scales are float16 numbers as NumPy rounds them, subnormal ones included: they cost digits, not the weight."""
    weight = deviation * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    result = quantize(weight, parse_choice("w8a16_g64:rtn"))
    peaks = weight.view(64, 4, 64).abs().amax(-1).numpy()
    steps = (peaks / np.float32(127)).astype(np.float16)
    expected = np.maximum(steps, np.nextafter(np.float16(0), np.float16(1))).astype(np.float32)
    np.testing.assert_array_equal(result.scales.numpy(), expected)
    error = (result.dequantize() - weight).square().mean() / weight.square().mean()
    assert float(error) < (1e-4 if deviation == 5e-4 else 0.02)


def test_scales_stay_within_float16() -> None:
    tiny = quantize(torch.full((1, 4), 1e-9), parse_choice("w8a16"))
    assert float(tiny.scales) == 2.0**-24 and not tiny.codes.any()
    with pytest.raises(PolicyError, match=r"holds 3e\+08; scales are float16, so w8a16 holds at most 8.32e\+06"):
        quantize(torch.full((1, 4), 3e8), parse_choice("w8a16"))


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("w16a16", FULL),
        ("w16a8", Choice(Format(16, 8), None)),
        ("w4a16_g64", Choice(Format(4, 16, 64), Recipe("mse", 1))),
        ("w4a16_g64:rtn", Choice(Format(4, 16, 64), Recipe("rtn", 1))),
        ("w8a8:rtn()", Choice(Format(8, 8), Recipe("rtn", 1))),
    ],
)
def test_choices_are_read_from_their_text_and_from_json(text: str, choice: Choice) -> None:
    assert parse_choice(text) == parse_choice(str(choice)) == Choice.from_json(choice.to_json()) == choice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4", "format 'int4' is unknown"),
        ("w5a16", "5-bit codes are not supported; choose from 2, 3, 4, 8 or 16"),
        ("w4a16_g1", "a group needs at least 2 inputs"),
        ("w4a16:best", "rounding method 'best' is unknown; choose one of: .*rtn"),
        ("w4a16:rtn(", r"recipe 'rtn\(' is malformed"),
        ("w4a16:rtn(steps=3)", "there is no parameter 'steps'; known, with their defaults: none"),
        ("w16a16:rtn", "a recipe belongs to weights below 16 bits"),
    ],
)
def test_text_that_is_no_choice_is_refused(text: str, message: str) -> None:
    with pytest.raises((ArtefactError, PolicyError), match=message):
        parse_choice(text)


def test_errors_name_the_layer_or_width() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    with pytest.raises(PolicyError, match="no layer '7'"):
        find_layer(model, "7")
    with pytest.raises(PolicyError, match="'1' is a GELU"), quantized(model, "1", parse_choice("w4a16")):
        pass
    with pytest.raises(PolicyError, match="5-bit codes"):
        code_range(5)
    with pytest.raises(PolicyError, match="not finite"):
        quantize(torch.tensor([[1.0, float("nan")]]), parse_choice("w4a16"))
    with pytest.raises(ArtefactError, match="is of version 7 of rtn, which is now at 1; measure and allocate again"):
        quantize(torch.ones(1, 2), Choice(Format(4), Recipe("rtn", 7)))
