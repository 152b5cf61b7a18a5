"""What every rounding method owes to engines, and each one's own promise against brute force."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibrator.quantizers import LayerStatistics, QuantizedWeight, parse_choice, quantize
from calibrator.quantizers.choices import method_names
from calibrator.quantizers.weights import code_range
from vla_policy.core.errors import ArtefactError

BITS = (2, 3, 4, 8)


def statistics(inputs: int, seed: int = 0) -> LayerStatistics:
    """Of inputs whose channels depend on each other, as a layer's do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    rows = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64) @ mixing
    return LayerStatistics(len(rows), rows.abs().amax(0).float(), rows.T @ rows / len(rows))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, result: QuantizedWeight) -> float:
    return float((result.dequantize().double() - weight.double()).square().sum())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("group", ["", "_g8", "_g5"])
def test_codes_and_scales_are_what_engines_hold(method: str, group: str, bits: int) -> None:
    weight = normal(6, 24, seed=bits)
    weight[2] = 0.0
    weight[3, 8:16] = 0.0
    choice = parse_choice(f"w{bits}a16{group}:{method}")
    result = quantize(weight, choice, statistics(24))
    low, high = code_range(bits)
    assert result.codes.dtype == torch.int8 and result.codes.shape == (6, 24)
    assert low <= int(result.codes.min()) and int(result.codes.max()) <= high
    assert result.scales.shape == (6, {"": 1, "_g8": 3, "_g5": 5}[group])
    assert torch.equal(result.scales, result.scales.half().float()) and bool((result.scales > 0).all())
    assert not result.dequantize()[2].any() and not result.dequantize()[3, 8:16].any()
    again = quantize(weight, choice, statistics(24))
    assert torch.equal(again.codes, result.codes) and torch.equal(again.scales, result.scales)


@pytest.mark.parametrize("method", method_names())
def test_a_convolution_is_its_equivalent_linear_map(method: str) -> None:
    conv, choice = nn.Conv2d(3, 8, 4, stride=4), parse_choice(f"w4a16_g16:{method}")
    image, matrix = (quantize(weight, choice, statistics(48)) for weight in (conv.weight, conv.weight.flatten(1)))
    assert image.dequantize().shape == conv.weight.shape
    assert torch.equal(image.dequantize().flatten(1), matrix.dequantize())


def best_error(group: np.ndarray, bits: int) -> float:
    """The least squared error over all positive scales in float16."""
    scales = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    low, high = code_range(bits)
    least = np.inf
    for part in np.array_split(scales, 16):
        codes = np.clip(np.round(group / part[:, None]), low, high)
        least = min(least, float(((codes * part[:, None] - group) ** 2).sum(1).min()))
    return least


@pytest.mark.parametrize(("bits", "allowed"), [(2, 1.005), (3, 1.002), (4, 1.002), (8, 1.1)])
@pytest.mark.parametrize("heavy", [False, True])
def test_the_searched_scale_is_nearly_the_best_of_all(bits: int, allowed: float, heavy: bool) -> None:
    weight = 0.02 * normal(24, 32, seed=bits) ** (3 if heavy else 1)
    searched = error(weight, quantize(weight, parse_choice(f"w{bits}a16:mse")))
    best = sum(best_error(row, bits) for row in weight.double().numpy())
    assert best <= searched * (1 + 1e-6) and searched < allowed * best


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", ["", "_g64", "_g7", "_g2"])
def test_the_searched_scale_is_never_worse_than_round_to_nearest(bits: int, group: str) -> None:
    for scale in (1.0, 1e-7, 1e3):
        weight = scale * normal(16, 70, seed=bits) ** 3
        nearest, searched = (quantize(weight, parse_choice(f"w{bits}a16{group}:{name}")) for name in ("rtn", "mse"))
        rows = [(one.dequantize().double() - weight.double()).square().sum(1) for one in (nearest, searched)]
        assert bool((rows[1] <= rows[0] * (1 + 1e-6)).all())


@pytest.mark.parametrize(("bits", "part"), [(2, 0.85), (3, 0.58), (4, 0.79), (8, 0.9)])
def test_less_error_at_equal_bytes(bits: int, part: float) -> None:
    """Of normal weights in groups of 64, round-to-nearest's error is what remains after this."""
    weight = normal(64, 1024)
    choices = (parse_choice(f"w{bits}a16_g64:{name}") for name in ("rtn", "mse"))
    nearest, searched = (error(weight, quantize(weight, choice)) for choice in choices)
    assert searched < part * nearest


def test_every_code_is_used_where_it_fits() -> None:
    codes = torch.arange(-8, 8).float()[None]
    result = quantize(0.25 * codes, parse_choice("w4a16:mse"))
    assert float(result.scales) == 0.25 and torch.equal(result.codes.float(), codes)


def test_parameters_reach_the_method_and_its_name() -> None:
    weight = normal(8, 64)
    choices = [parse_choice(f"w8a16:mse(steps={steps})") for steps in (2, 32, 400)]
    assert list(map(str, choices)) == ["w8a16:mse(steps=2)", "w8a16:mse", "w8a16:mse(steps=400)"]
    errors = [error(weight, quantize(weight, choice)) for choice in choices]
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(ArtefactError, match=r"steps=many is no int, e\.g\. 32"):
        parse_choice("w8a16:mse(steps=many)")
    with pytest.raises(ArtefactError, match="no parameter 'step'; known, with their defaults: steps=32"):
        parse_choice("w8a16:mse(step=3)")


@pytest.mark.usefixtures("by_input")
def test_a_method_is_added_by_adding_its_module() -> None:
    assert "by_input" in method_names()
    choice = parse_choice("w4a16:by_input(share=0.25)")
    seen = LayerStatistics(10, torch.tensor([1.0, 4.0]))
    result = quantize(torch.tensor([[0.9, -3.0]]), choice, seen)
    assert torch.equal(result.dequantize(), torch.tensor([[1.0, -1.0]]))
    assert choice.to_json()["recipe"] == {"method": "by_input", "version": 3, "parameters": {"share": 0.25}}
    with pytest.raises(ArtefactError, match="by_input needs the layer's inputs over a calibration set"):
        quantize(torch.ones(1, 2), parse_choice("w4a16:by_input"))
