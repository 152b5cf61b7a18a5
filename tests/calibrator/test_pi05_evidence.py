"""Evidence for a flow head: boundaries, objective and first-order scores against passes written out."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_source import FakeSource
from pi05_policy import PI0, tiny_config, tiny_pi05_folder
from torch import Tensor

from calibrator.__main__ import main
from calibrator.allocation.plan import Plan
from calibrator.data.calibration import collect
from calibrator.families import live_units
from calibrator.families.pi05 import FlowDecisions, Pi05
from calibrator.quantizers import parse_choice, quantized
from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.passes import signals
from calibrator.sensitivity.proxy import directions, first_order
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec
from vla_policy.core.errors import PolicyError
from vla_policy.core.formats import FULL

W2, W8 = parse_choice("w2a16_g32:rtn"), parse_choice("w8a16_g32:rtn")
PREFIX = "paligemma_with_expert.paligemma.model.language_model.layers"
EXPERT = "paligemma_with_expert.gemma_expert.model.layers"
UNITS = (
    "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.patch_embedding",
    "paligemma_with_expert.paligemma.model.multi_modal_projector.linear",
    f"{PREFIX}.0.mlp.down_proj",
    f"{PREFIX}.2.self_attn.v_proj",
    "action_in_proj",
    f"{EXPERT}.1.self_attn.q_proj",
    f"{EXPERT}.2.mlp.down_proj",
    "action_out_proj",
)
NUMBERS = (0, 1, 2)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SweepSpec:
    return spec_of(tmp_path_factory.mktemp("pi05"))


@pytest.fixture(scope="module")
def pi0(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return spec_of(tmp_path_factory.mktemp("pi0"), **PI0).open()


def spec_of(folder: Path, **changes: Any) -> SweepSpec:
    policy = tiny_pi05_folder(folder / "policy", **changes)
    collect([FakeSource((2, 1))], folder / "calibration", count=3, seed=0)
    return SweepSpec(str(policy), str(folder / "calibration"), SweepSettings((W2, W8)), batch_size=2)


@pytest.fixture(scope="module")
def sweep(spec: SweepSpec) -> Sweep:
    return spec.open()


def written_out(sweep: Sweep, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """H and dJ/dH at the boundaries, and J, of one state, by one plain pass through the policy's parts."""
    policy = sweep.policy
    assert isinstance(policy, Pi05)
    inputs = sweep.states.inputs(policy, (number,))
    points: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> Tensor:
        points[name] = value
        return value

    with torch.enable_grad():
        features = keep("vision", policy.vision(inputs["pixel_values"]).detach().requires_grad_())
        patches = keep("projector", policy.project(features))
        x = policy.embed(patches, inputs["input_ids"])
        entering, cache = policy.read(x)
        keep("language", entering[1])
        states, _ = policy.integrated(inputs["noise"], cache, inputs.get("state"))
        keep("head", states)
        weight, bias = policy.action_out_proj.weight, policy.action_out_proj.bias
        actions = inputs["noise"] - (states @ weight.T + bias).sum(1) / 3
        row = actions[0, :2, :3]  # rows that are carried out, dimensions that the robot has
        decided = torch.from_numpy(sweep.reference.decided[number]).view(4, 3)[:2]
        # Normalised by quantiles of -1 to 1, -0.5 to 0.5 and -1 to 1; pi0 by mean and deviation themselves.
        mean, deviation = torch.tensor([0.1, -0.1, 0.4]), torch.tensor([0.4, 0.4, 0.5])
        if "state" in inputs:
            mean, deviation = torch.zeros(3), torch.ones(3)
        direction = (decided - mean) / deviation**2
        objective = ((row - mean) * direction).sum() / ((decided - mean) * direction).sum()
        found = torch.autograd.grad(objective, list(points.values()))
    return points, dict(zip(points, found, strict=True)), objective


@pytest.mark.parametrize("unit", [None, UNITS[0], UNITS[2], UNITS[3], UNITS[6], UNITS[7]])
def test_boundaries_and_gradients_are_those_of_a_plain_pass(sweep: Sweep, unit: str | None) -> None:
    assert_a_plain_pass(sweep, unit)


@pytest.mark.parametrize("unit", [None, "state_proj", "action_time_mlp_in", "action_time_mlp_out", UNITS[5]])
def test_pi0_s_boundaries_and_gradients_are_those_of_a_plain_pass(pi0: Sweep, unit: str | None) -> None:
    assert_a_plain_pass(pi0, unit)


def assert_a_plain_pass(sweep: Sweep, unit: str | None) -> None:
    segments = {one.name: one.segment for one in live_units(sweep.policy)}
    for number in NUMBERS:
        trunk, measured = sweep.full_precision((number,))
        if unit is None:
            points, gradients, objective = written_out(sweep, number)
            assert objective.item() == pytest.approx(1, abs=1e-4)
        else:
            with quantized(sweep.policy, unit, W2):
                measured = signals(trunk, segments[unit])
                points, gradients, objective = written_out(sweep, number)
            assert abs(objective.item() - 1) > 1e-4
        assert measured.objective.item() == pytest.approx(objective.item(), abs=1e-4)
        for name in BOUNDARIES:
            wanted = points[name].detach().reshape(measured.hidden[name].shape)
            torch.testing.assert_close(measured.hidden[name], wanted, atol=1e-4, rtol=1e-4)
            slope = gradients[name].reshape(wanted.shape)
            torch.testing.assert_close(measured.gradients[name], slope, atol=1e-4 * float(slope.abs().max()), rtol=1e-3)


def test_only_the_rows_that_are_carried_out_count(sweep: Sweep) -> None:
    decisions, decided = sweep.states.decisions, torch.from_numpy(sweep.reference.decided)
    assert isinstance(decisions, FlowDecisions) and decisions.size == 12
    later, now = decided.clone(), decided.clone()
    later[:, 6:] += 1
    now[:, 5] += 1
    assert torch.equal(decisions.error(later, decided), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(decisions.objective(later, decided), decisions.objective(decided, decided))
    torch.testing.assert_close(decisions.error(now, decided), torch.ones(3, dtype=torch.float64))
    assert decisions.scores(decided).shape == (3, 4, 3)
    assert decisions.decision(decided[0].numpy()).action.shape == (4, 3)


def test_other_noises_are_told_as_an_action_error(spec: SweepSpec, sweep: Sweep) -> None:
    """Each state decided by itself with each of the bank's first four noises, against its own decision."""
    policy, bank = sweep.policy, np.load(Path(spec.policy) / "noise.npy")
    assert isinstance(policy, Pi05)
    for number in NUMBERS:
        inputs = sweep.states.inputs(policy, (number,))
        _, cache = policy.read(policy.embed(policy.project(policy.vision(inputs["pixel_values"])), inputs["input_ids"]))
        chunks = [policy.integrated(torch.from_numpy(bank[entry : entry + 1]), cache)[1] for entry in range(4)]
        own = sweep.reference.decided[number].reshape(4, 3)[:2].astype(np.float64)
        far = [np.square(chunk[0, :2, :3].detach().double().numpy() - own).sum() for chunk in chunks]
        assert sweep.reference.spread[number] == pytest.approx(np.mean(far), rel=1e-4)
    assert sweep.reference.spread.min() > 1e-3


def test_the_spread_over_noises_is_in_the_table_the_command_s_words_and_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the projections of the actions, which are small, keep 16 bits unless a pin says otherwise."""
    spec = spec_of(tmp_path)
    bank = Path(spec.policy) / "noise.npy"
    np.save(bank, 0.02 * np.load(bank))  # a random policy does not forget its noise: 20, where layers change 0.01 to 1
    table, layers = tmp_path / "sensitivity.json", ["action_*", f"{EXPERT}.2.mlp.*", f"{PREFIX}.2.*"]
    command = ["sensitivity", "--policy", spec.policy, "--calibration", spec.calibration, "--out", str(table)]
    assert main([*command, "--choices", str(W2), str(W8), "--bins", "1", "--units", *layers]) == 0
    content, spread = json.loads(table.read_text()), float(spec.open().reference.spread.mean())
    assert content["random_spread"]["action_mse"] == pytest.approx(spread, rel=1e-4)
    errors = {unit["name"]: unit["action_mse"][str(W2)] for unit in content["units"]}
    below = sum(error < spread for error in errors.values())
    assert 0 < below < len(errors), "the case says something"
    told = f"change the action by {spread:.2g} (action error); {below} of {len(errors)} layers in {W2} change it less"
    assert told in capsys.readouterr().out

    page = tmp_path / "report.html"
    assert main(["report", "--sensitivity", str(table), "--out", str(page)]) == 0
    said = re.search(r"change the action by an action error of\s+<data value=\"(.*?)\">.*?(\d+) of (\d+) layers",
                     page.read_text(), re.DOTALL)  # fmt: skip
    assert said is not None and float(said[1]) == pytest.approx(spread, rel=1e-4)
    assert (int(said[2]), int(said[3])) == (below, len(errors))

    plan = tmp_path / "plan.json"
    command = ["allocate", "--sensitivity", str(table), "--average-bits", "3", "--out", str(plan)]
    for pins, wanted in (([], FULL), (["--pin", f"action_*_proj={W8}"], W8)):
        assert main([*command, *pins]) == 0
        assignment = Plan.load(plan).assignment
        assert {assignment["action_in_proj"], assignment["action_out_proj"]} == {wanted}
        assert assignment[f"{EXPERT}.2.mlp.gate_proj"] == assignment[f"{EXPERT}.2.mlp.up_proj"]
        assert assignment[f"{PREFIX}.2.self_attn.k_proj"] == assignment[f"{PREFIX}.2.self_attn.v_proj"]


def test_eight_bits_move_the_evidence_mass_as_predicted(spec: SweepSpec) -> None:
    fine = replace(spec, settings=SweepSettings((W8,))).open()
    for unit, found in zip(UNITS, first_order(fine, UNITS, evidence=True), strict=True):
        exact = fine.evaluate(unit, fine.settings.choices, NUMBERS).mass
        scale = exact.mean((0, 1))
        assert scale.max() > 0
        # As for other policies: what is left out is of second order in the step.
        allowed = 0.15 * scale + 0.03 * scale.max()
        for column, name in enumerate(BOUNDARIES):
            assert np.abs(np.abs(found.mass) - exact)[..., column].mean() < allowed[column], f"{unit} at {name}"


def test_probes_of_random_signs_estimate_the_sum_over_all_values() -> None:
    generator = torch.Generator().manual_seed(1)
    slopes = torch.randn(70, 400, generator=generator)  # of 70 values, each with respect to 400 numbers
    exact = slopes.square().sum()
    assert len(directions(70)) == 8 and len(directions(7)) == 7
    # Off-diagonal products of 8 probes leave a relative deviation of about sqrt(2 / (8 * 400)) = 2.5 %.
    assert (directions(70) @ slopes).square().sum() == pytest.approx(exact.item(), rel=0.12)
    torch.testing.assert_close((directions(7) @ slopes[:7]).square().sum(), slopes[:7].square().sum())


def test_a_dimension_that_never_varied_asks_nothing(spec: SweepSpec, tmp_path: Path) -> None:
    stats = tiny_config()["norm_stats"]
    stats["tiny"]["action"] |= {"q01": [-1.0, 0.0, -1.0], "q99": [1.0, 0.0, 1.0], "std": [0.4, 0.0, 0.5]}
    policy = tiny_pi05_folder(tmp_path / "policy", norm_stats=stats)
    decisions = replace(spec, policy=str(policy)).open().states.decisions
    decided = torch.full((1, 12), 0.5)
    still, moved = decided.clone(), decided.clone()
    still[:, 1], moved[:, 0] = 0.9, 0.9
    assert decisions.objective(still, decided).item() == pytest.approx(1)
    assert decisions.objective(moved, decided).item() > 1.01


def test_statistics_without_mean_and_deviation_are_refused(spec: SweepSpec, tmp_path: Path) -> None:
    stats = {"tiny": {"action": {"q01": [-1.0] * 3, "q99": [1.0] * 3}}}
    policy = tiny_pi05_folder(tmp_path / "policy", norm_stats=stats, state_in_prompt=False)
    with pytest.raises(PolicyError, match=r"norm_stats\.tiny\.action: mean and std are missing; the objective needs"):
        replace(spec, policy=str(policy)).open()
