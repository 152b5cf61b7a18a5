"""First-order scores against exact evaluations where the perturbation is small."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from calibrator.families import Unit, live_units
from calibrator.quantizers import parse_choice
from calibrator.sensitivity import proxy
from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.proxy import first_order
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec

UNITS = (
    "vision_backbone.featurizer.patch_embed.proj",
    "vision_backbone.fused_featurizer.blocks.0.attn.qkv",
    "projector.fc1",
    "language_model.model.layers.0.self_attn.v_proj",
    "language_model.model.layers.1.mlp.down_proj",
    "language_model.lm_head",
)
ALL = tuple(range(8))
# What float32 leaves of an estimate when products are summed up in another order, as in another batch. The action's is
# a sum of squares, off by twice the 1e-5 of its gradients. The mass is signed, comes from a backward pass through a
# backward pass, and may nearly cancel.
ACTION = {"rtol": 1e-3, "atol": 1e-9}
MASS = {"rtol": 2e-2, "atol": 1e-5}


@pytest.fixture(scope="module", params=["w8a16_g32", "w8a8_g32"])
def small_steps(request: pytest.FixtureRequest, spec: SweepSpec) -> Sweep:
    return replace(spec, settings=SweepSettings((parse_choice(request.param),))).open()


def test_eight_bits_move_the_evidence_mass_as_predicted(small_steps: Sweep) -> None:
    for unit, found in zip(UNITS, first_order(small_steps, UNITS, evidence=True), strict=True):
        exact = small_steps.evaluate(unit, small_steps.settings.choices, ALL).mass
        predicted = np.abs(found.mass)
        scale = exact.mean((0, 1))
        assert scale.max() > 0
        # What first order leaves out is of second order in the step, whether or not the first nearly cancels at a
        # boundary: a part of the layer's largest effect comes on top of a part of this one.
        allowed = 0.15 * scale + 0.03 * scale.max()
        for column, name in enumerate(BOUNDARIES):
            assert np.abs(predicted - exact)[..., column].mean() < allowed[column], f"{unit} at {name}"


def test_the_head_moves_evidence_through_its_backward_pass_too(sweep: Sweep) -> None:
    """The head boundary's own activations do not change; all of its loss comes from the gradient's way back."""
    (found,) = first_order(sweep, ["language_model.lm_head"], evidence=True)
    assert np.abs(found.mass[..., BOUNDARIES.index("head")]).min() > 0


def test_states_in_other_batches_give_the_same_estimates(spec: SweepSpec, sweep: Sweep) -> None:
    single = replace(spec, batch_size=1).open()
    for one, many in zip(first_order(single, UNITS, True), first_order(sweep, UNITS, True), strict=True):
        np.testing.assert_allclose(one.action, many.action, **ACTION)
        np.testing.assert_allclose(one.mass, many.mass, **MASS)


def test_states_of_two_images_are_kept_apart(two_images: SweepSpec) -> None:
    together, single = two_images.open(), replace(two_images, batch_size=1).open()
    for one, many in zip(first_order(single, UNITS, True), first_order(together, UNITS, True), strict=True):
        np.testing.assert_allclose(one.action, many.action, **ACTION)
        np.testing.assert_allclose(one.mass, many.mass, **MASS)


def test_what_a_pass_keeps_is_bounded_and_changes_nothing(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = first_order(sweep, UNITS, True)
    monkeypatch.setattr("calibrator.sensitivity.proxy._KEPT_BYTES", 1)
    kept: list[int] = []
    original = proxy._pass

    def counted(sweep: Sweep, samples: tuple[int, ...], units: Sequence[Unit], evidence: bool) -> Any:
        kept.append(len(units))
        return original(sweep, samples, units, evidence)

    monkeypatch.setattr("calibrator.sensitivity.proxy._pass", counted)
    for one, other in zip(first_order(sweep, UNITS, True), whole, strict=True):
        np.testing.assert_allclose(one.action, other.action, **ACTION)
        np.testing.assert_allclose(one.mass, other.mass, **MASS)
    assert set(kept) == {1} and len(kept) >= len(UNITS)


def test_the_action_estimate_orders_widths(sweep: Sweep) -> None:
    names = [unit.name for unit in live_units(sweep.policy)]
    for found in first_order(sweep, names, evidence=False):
        low, middle, high = found.action.mean(-1)
        assert low > middle > high > 0
        assert found.mass.shape == (3, 8, 0)
