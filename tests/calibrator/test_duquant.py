"""DuQuant: an operator that changes nothing but what rounding sees, and less error where outliers are."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from choices import W4, WITH_ACTIVATIONS
from naive import MASS
from tables import scored, table
from torch import Tensor, nn

from calibrator.allocation.options import build_groups
from calibrator.quantizers import InputScale, LayerStatistics, QuantizedWeight, parse_choice, quantize, quantized
from calibrator.quantizers.activations import quantize_activation, quantize_input
from calibrator.quantizers.methods.duquant import QUANTIZER, found_operator, greedy_rotation, zigzag
from calibrator.quantizers.store import layer_path, read_layer, write_layer
from calibrator.quantizers.turning import InputOperator
from calibrator.sensitivity.measure import measure
from calibrator.sensitivity.proxy import first_order
from calibrator.sensitivity.run import RunOptions
from calibrator.sensitivity.scores import ScoreSettings
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec
from calibrator.sensitivity.table import Objective
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL, Choice, Rounding


def with_outliers(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    """A few channels that are fifty times as large as the others, as in trained decoders."""
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed))
    x[:, 3::23] *= 50
    return x


def statistics_of(x: Tensor) -> LayerStatistics:
    wide = x.double()
    return LayerStatistics(len(x), x.abs().amax(0), x.abs().mean(0), wide.T @ wide / len(x), x[:64])


def parameters(**given: int) -> dict[str, bool | int | float]:
    return {**QUANTIZER.defaults, **given}


FORMS = [(96, {}), (96, {"shared": False}), (150, {"rotations": 1}), (150, {"shared": False, "steps": 3}), (40, {})]


@pytest.mark.parametrize(("inputs", "given"), FORMS, ids=str)
def test_the_layer_computes_what_it_did(inputs: int, given: dict[str, int]) -> None:
    """In float64, with the very numbers that are stored, whether blocks fit or something is left over."""
    x, weight = with_outliers(50, inputs), torch.randn(20, inputs, dtype=torch.float64)
    operator = found_operator(x, parameters(**given))
    turned, expected = operator.apply(x.double()) @ operator.weight(weight).T, x.double() @ weight.T
    assert float((turned - expected).abs().max()) < 1e-11 * float(expected.abs().max())
    assert not torch.equal(operator.apply(x), x)
    y = torch.randn(50, inputs, dtype=torch.float64)
    one, other = (operator.apply(x.double()) * y).sum(), (x.double() * operator.back(y)).sum()
    assert float(one) == pytest.approx(float(other), rel=1e-12), "the transposed operator"
    sizes = {turn.blocks.shape[1:] for turn in operator.turns}
    assert sizes == {(min(64, inputs),) * 2} and len(operator.turns) == given.get("rotations", 2)
    assert all(torch.equal(turn.blocks, turn.blocks.half().float()) for turn in operator.turns)


@pytest.mark.parametrize("size", [2, 16, 64])
def test_rotations_are_orthogonal_and_spread_outliers(size: int) -> None:
    x = with_outliers(40, 3 * size).unflatten(1, (3, size)).transpose(0, 1)
    for blocks in (x, x.flatten(0, 1)[None]):
        found = greedy_rotation(blocks, 64)
        identity = torch.eye(size, dtype=torch.float64).expand(len(found), -1, -1)
        torch.testing.assert_close(found @ found.mT, identity, rtol=0, atol=1e-12)
        before, after = (one.abs().amax((1, 2)) for one in (blocks, blocks @ found.float()))
        assert bool((after <= before * (1 + 1e-6)).all())
        if size == 64:
            assert bool((after < 0.5 * before).all())
    assert torch.equal(greedy_rotation(x, 0)[0], torch.eye(size, dtype=torch.float64))


def test_a_step_leaves_the_largest_channel_its_even_share_and_mixes_the_rest() -> None:
    """Sec. 3.2: an outlier alone keeps 1 / sqrt(size) of itself in its own channel, and nothing is lost."""
    x = torch.zeros(1, 5, 16)
    x[0, :, 11] = 8.0
    turned = x @ greedy_rotation(x, 1).float()
    torch.testing.assert_close(turned[0, :, 11], torch.full((5,), 8 / 16**0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert float(turned.abs().max()) < 8 and int((turned[0, 0].abs() > 0.1).sum()) > 8


@pytest.mark.parametrize(("inputs", "size"), [(12, 4), (14, 4), (6, 6), (9, 2)])
def test_channels_are_dealt_out_in_zigzag(inputs: int, size: int) -> None:
    """By hand: the largest to the first block, on to the last and back."""
    peaks = torch.rand(inputs, generator=torch.Generator().manual_seed(inputs))
    falling = sorted(range(inputs), key=lambda channel: -float(peaks[channel]))
    blocks: list[list[int]] = [[] for _ in range(inputs // size)]
    place, step = 0, 1
    for channel in falling[: len(blocks) * size]:
        blocks[place].append(channel)
        if not 0 <= place + step < len(blocks):
            step = -step
        else:
            place += step
    expected = [channel for block in blocks for channel in block] + falling[len(blocks) * size :]
    assert zigzag(peaks, size).tolist() == expected


def output_error(x: Tensor, weight: Tensor, text: str) -> float:
    """Of x W^T with 8-bit activations per token, relative, on inputs that the method has not seen."""
    choice, module = parse_choice(text), nn.Linear(weight.shape[1], len(weight), bias=False)
    found = quantize(weight, choice, statistics_of(with_outliers(200, weight.shape[1], seed=1)))
    got = quantize_input(module, x, choice.format, operator=found.operator) @ found.dequantize().T
    return float((got - x @ weight.T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("shared", ["true", "false"])
def test_outliers_hurt_less(shared: str) -> None:
    """Large channels meet small weights: without an operator the others nearly vanish in the activations' rounding."""
    x = with_outliers(300, 256)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    weight[:, 3::23] /= 50
    duquant, rtn, mse = (output_error(x, weight, f"w8a8:{m}") for m in (f"duquant(shared={shared})", "rtn", "mse"))
    assert duquant < 0.5 * min(rtn, mse)


def test_a_layer_runs_with_its_operator_and_is_restored() -> None:
    """In NumPy: gather, product of blocks, codes per token, product of integers."""
    linear, choice = nn.Linear(150, 8), parse_choice("w4a8_g32:duquant(rotations=1)")
    x = with_outliers(20, 150)
    found = quantize(linear.weight, choice, statistics_of(x))
    assert found.operator is not None
    (turn,) = found.operator.turns
    seen = x.numpy()[:, turn.order.numpy()]
    seen[:, :128] = (seen[:, :128].reshape(20, 2, 64) @ turn.blocks[0].numpy()).reshape(20, 128)
    step = np.abs(seen).max(1, keepdims=True) / np.float32(127)
    expected = np.rint(seen / step) * step @ found.dequantize().numpy().T + linear.bias.detach().numpy()

    class Kept:
        def of(self, unit: str, weight: Tensor, choice: Choice) -> QuantizedWeight:
            return found

    before = linear(x)
    with torch.no_grad(), quantized(nn.Sequential(linear), "0", choice, Kept()):
        got = linear(x).numpy()
    # A value near the middle of two codes may get the other one, in some of the 3,000.
    assert np.abs(got - expected).mean() < 1e-3 * np.abs(expected).mean()
    assert torch.equal(linear(x), before)
    outside = found.seen_from_outside()
    torch.testing.assert_close(
        x.double() @ outside.T, found.operator.apply(x.double()) @ found.dequantize().double().T
    )


def test_a_convolution_turns_its_patches() -> None:
    conv, choice = nn.Conv2d(3, 8, 8, stride=8, bias=False), parse_choice("w8a8:duquant(block=32,steps=16)")
    image = torch.randn(2, 3, 16, 24)
    rows = nn.functional.unfold(image, 8, stride=8).mT.reshape(-1, 192)
    found = quantize(conv.weight, choice, statistics_of(rows))
    assert found.operator is not None and found.dequantize().shape == conv.weight.shape
    expected = quantize_activation(found.operator.apply(rows), 8) @ found.dequantize().flatten(1).T
    with torch.no_grad():
        conv.weight.copy_(found.dequantize())
        got = conv(quantize_input(conv, image, choice.format, operator=found.operator))
    torch.testing.assert_close(got.flatten(2).mT.reshape(-1, 8), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["duquant(shared=false)", "quantvla"])
def test_what_is_stored_is_what_was_found(tmp_path: Path, method: str) -> None:
    weight, choice = torch.randn(8, 150), parse_choice(f"w4a8_g32:{method}")
    found = quantize(weight, choice, statistics_of(with_outliers(70, 150)))
    write_layer(tmp_path, "layer", found)
    read = read_layer(layer_path(tmp_path, "layer"), weight, choice)
    x = torch.randn(4, 150)
    assert read.operator is not None and found.operator is not None
    assert torch.equal(read.operator.apply(x), found.operator.apply(x))
    assert torch.equal(read.dequantize(), found.dequantize())
    (tmp_path / "layers/layer.safetensors").unlink()
    short = InputOperator.of([(torch.arange(100), torch.eye(64)[None])])
    write_layer(tmp_path, "layer", replace(found, operator=short))
    with pytest.raises(ArtefactError, match="its input operator is not of 150 inputs; quantize this policy"):
        read_layer(layer_path(tmp_path, "layer"), weight, choice)


@pytest.mark.parametrize(("shared", "matrices"), [("true", 1), ("false", 4)])
def test_an_operator_s_bytes_are_counted(shared: str, matrices: int) -> None:
    plain, turned = (
        scored("layer", {parse_choice(text): 0.1, FULL: 0.0}, inputs=256)
        for text in ("w4a8_g32", f"w4a8_g32:duquant(shared={shared})")
    )
    one, other = (build_groups(table([unit]), Objective())[0].options[0] for unit in (plain, turned))
    assert other.size_bits - one.size_bits == 2 * (32 * 256 + 16 * matrices * 64**2)


def test_a_fixed_scale_and_parameters_out_of_range_are_refused() -> None:
    operator = found_operator(with_outliers(9, 8), parameters(steps=1))
    fixed = InputScale(Rounding.TENSOR, 0.1)
    with pytest.raises(ArtefactError, match="w8a8: its fixed scale is of inputs as they come, not of turned ones"):
        quantize_input(nn.Linear(8, 2), torch.ones(1, 8), parse_choice("w8a8").format, fixed, operator)
    for wrong in ({"block": 1}, {"rotations": 0}, {"steps": -1}):
        with pytest.raises(ArtefactError, match=r"duquant: block=.*: expected at least 2, 1 and 0"):
            found_operator(torch.ones(1, 8), parameters(**wrong))


@dataclass
class Exact:
    """Codes that round nothing: only the operator is there."""

    inner: QuantizedWeight

    def of(self, unit: str, weight: Tensor, choice: Choice) -> QuantizedWeight:
        operator = InputOperator.of([(torch.arange(weight[0].numel()).flip(0), torch.eye(32)[None])])
        rows = operator.weight(weight.detach().flatten(1).double()).float().reshape(weight.shape)

        class Whole(QuantizedWeight):
            def dequantize(self) -> Tensor:
                return rows

        found = quantize(weight, W4)
        return Whole(found.codes, found.scales, found.format, found.shape, operator)


@pytest.mark.parametrize(
    "unit",
    ["language_model.model.layers.1.mlp.up_proj", "projector.fc1", "vision_backbone.featurizer.patch_embed.proj"],
)
def test_an_operator_alone_changes_no_score(sweep: Sweep, unit: str) -> None:
    """Exactly and to first order: what is left is the rounding of sums in another order."""
    settings = SweepSettings((W4,))
    turned = Sweep(sweep.policy, sweep.states, sweep.reference, settings, Exact(None))  # type: ignore[arg-type]
    plain = Sweep(sweep.policy, sweep.states, sweep.reference, settings)
    exact, real = (one.evaluate(unit, (W4,), (0, 1)) for one in (turned, plain))
    assert exact.mass.max() < MASS["atol"] * 2 < 0.1 * real.mass.max()
    first, other = (first_order(one, [unit], True)[0] for one in (turned, plain))
    assert np.abs(first.action).max() < 1e-6 * np.abs(other.action).max()
    assert np.abs(first.mass).max() < 1e-3 * np.abs(other.mass).max()


def test_sensitivity_scores_it(spec: SweepSpec, tmp_path: Path) -> None:
    """With its codes computed once, beside the same formats by round-to-nearest."""
    eight = WITH_ACTIVATIONS[-1]
    choices = (parse_choice(f"{eight.format}:duquant(block=16,steps=8)"), eight)
    options = RunOptions(unit_globs=("projector.fc1", "language_model.model.layers.1.mlp.*"), first_order=True)
    result = measure(
        replace(spec, settings=SweepSettings(choices)), tmp_path / "s.json", ScoreSettings(bins=1), options
    )
    for unit in result.units:
        assert all(0 < unit.omega[choice] < 1 for choice in choices)
        assert all(unit.action_proxy[choice] > 0 for choice in choices)
