"""Evidence and score mathematics: identities, bounds, and hand-computed values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrator.data.calibration import progress
from calibrator.sensitivity.evidence import (
    JS_BOUND,
    Profile,
    evidence_map,
    jensen_shannon,
    mass_distortion,
    profile,
)
from calibrator.sensitivity.scores import evidence_loss, phase_of, phase_scores, soft_bottleneck, temporal_score


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.3])
def test_the_deviation_cancels(epsilon: float) -> None:
    """|Z dJ/dZ| of Eqs. (3), (4), differentiated in Z itself, equals |(H - mean) dJ/dH|."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 7, 6, generator=generator, dtype=torch.float64)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    mean, deviation = hidden.flatten(0, 1).mean(0), hidden.flatten(0, 1).std(0) * 10

    def objective(h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(h @ mix).square().sum()

    normalised = ((hidden - mean) / (deviation + epsilon)).requires_grad_()
    (by_z,) = torch.autograd.grad(objective(normalised * (deviation + epsilon) + mean), normalised)
    leaf = hidden.clone().requires_grad_()
    (by_h,) = torch.autograd.grad(objective(leaf), leaf)
    expected = (normalised * by_z).abs().float()
    # Three roundings to float32, 2e-7 of it, and more of differences from the mean that nearly cancel.
    torch.testing.assert_close(evidence_map(hidden, mean, by_h), expected, rtol=1e-5, atol=1e-7)


def test_profile_of_a_known_map() -> None:
    result = profile(torch.tensor([[[1.0, 3.0], [0.0, 4.0]]]), epsilon=0.0)
    assert result.mass.tolist() == [2.0]
    assert result.attribution.tolist() == [[0.125, 0.375, 0.0, 0.5]]


def test_mass_distortion_is_symmetric_in_gain_and_loss() -> None:
    one, double = (Profile(torch.tensor([mass], dtype=torch.float64), torch.zeros(1, 1)) for mass in (1.0, 2.0))
    assert float(mass_distortion(one, double)) == pytest.approx(math.log(2))
    assert float(mass_distortion(double, one)) == pytest.approx(math.log(2))
    assert float(mass_distortion(one, one)) == 0.0


def _rows(values: list[float]) -> torch.Tensor:
    row = torch.tensor([values], dtype=torch.float64) + 1e-12
    return row / row.sum()


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)), min_size=2, max_size=30))
def test_divergence_is_bounded_symmetric_and_equals_its_definition(pairs: list[tuple[float, float]]) -> None:
    p, q = (_rows(list(values)) for values in zip(*pairs, strict=True))
    got = float(jensen_shannon(p, q))
    assert 0.0 <= got <= JS_BOUND
    assert got == pytest.approx(float(jensen_shannon(q, p)), abs=1e-15)
    middle = (p + q) / 2
    definition = float((torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum() / 2)
    assert got == pytest.approx(definition, abs=1e-12)


def test_divergence_at_its_ends() -> None:
    apart = jensen_shannon(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double())
    assert float(apart) == pytest.approx(math.log(2))
    same = torch.rand(3, 50).double()
    assert jensen_shannon(same, same).tolist() == [0.0, 0.0, 0.0]


def test_divergence_keeps_its_digits_near_zero() -> None:
    p = torch.full((1, 4), 0.25, dtype=torch.float64)
    shift = torch.tensor([[1.0, -1.0, 1.0, -1.0]]).double() * 1e-6
    # To second order the divergence is sum(shift^2 / p) / 8.
    assert float(jensen_shannon(p, p + shift)) == pytest.approx(4 * 1e-12 / 0.25 / 8, rel=1e-3)


@given(st.lists(st.floats(0, 50), min_size=4, max_size=4), st.floats(0.01, 10))
def test_soft_bottleneck_lies_between_mean_and_maximum(losses: list[float], kappa: float) -> None:
    values = np.asarray(losses)
    got = float(soft_bottleneck(values, kappa))
    assert values.mean() - 1e-9 <= got <= values.max() + 1e-9
    assert got >= values.max() - kappa * math.log(4) - 1e-9


def test_soft_bottleneck_of_known_losses() -> None:
    losses = np.asarray([0.1, 0.2, 0.3, 0.4])
    expected = 0.1 * math.log(sum(math.exp(loss / 0.1) for loss in losses) / 4)
    assert float(soft_bottleneck(losses, 0.1)) == pytest.approx(expected)
    assert float(soft_bottleneck(np.asarray([900.0, 0.0, 0.0, 0.0]), 0.1)) == pytest.approx(900 - 0.1 * math.log(4))


def test_progress_and_phases() -> None:
    assert [progress(step, 5) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert progress(0, 1) == 0.0
    assert phase_of(np.asarray([0.0, 0.09, 0.1, 0.95, 1.0]), 10).tolist() == [0, 0, 1, 9, 9]


def test_temporal_score_is_the_worst_phase_and_skips_empty_ones() -> None:
    losses = np.asarray([[1.0, 3.0, 2.0, 8.0]])
    phases = np.asarray([0, 0, 4, 4])
    by_phase = phase_scores(losses, phases, 10)[0]
    assert (by_phase[0], by_phase[4]) == (2.0, 5.0)
    assert np.isnan(by_phase[[1, 2, 3, 5, 6, 7, 8, 9]]).all()
    assert temporal_score(losses, phases).tolist() == [5.0]


def test_loss_weighs_attribution() -> None:
    assert evidence_loss(np.asarray(0.5), np.asarray(0.25), 2.0) == 1.0
