"""The screening against tables whose truth is known, and a screened run from command to plan."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tables import BY_BITS

from calibrator.__main__ import main
from calibrator.allocation.options import Budget, Group, Option
from calibrator.allocation.plan import Plan
from calibrator.allocation.solve import solve
from calibrator.sensitivity.screening import (
    Estimate,
    Evaluate,
    Request,
    Screen,
    ScreenProblem,
    ScreenSettings,
    cheapest,
    check_cap,
    state_order,
)
from calibrator.sensitivity.table import Objective, Sensitivity, load_tensors
from vla_policy.core.errors import BudgetError

BITS = (2, 4, 8)


def made_up(units: int, states: int, seed: int, spread: float = 0.2) -> tuple[ScreenProblem, np.ndarray]:
    """Losses and their predictions, `spread` (in logarithms) apart per layer and width, and per state.

    What differs per state is the prediction's error: the largest predictions are large by chance too, as in reality.
    """
    generator = np.random.default_rng(seed)
    fragility = generator.normal(0, 2, (units, 1, 1))
    levels = fragility + np.asarray([0.0, -2.0, -5.0])[:, None]
    losses = np.exp(levels + generator.normal(0, 0.8, (units, 3, states)))
    predicted = losses * np.exp(generator.normal(0, spread, (units, 3, states)))
    losses *= np.exp(generator.normal(0, spread, (units, 3, 1)))
    names = [str(index) for index in range(units)]
    params = generator.integers(10, 100, units).astype(float)
    problem = ScreenProblem(params, ["language"] * units, names, BITS, predicted, np.arange(states) % 10, 0.75, 0.25)
    return problem, losses


class FakeEvaluator:
    """Answers from a finished table and counts what was asked."""

    def __init__(self, losses: np.ndarray) -> None:
        self.losses = losses
        self.asked: set[tuple[int, int, int]] = set()

    def __call__(self, requests: Sequence[Request]) -> Sequence[np.ndarray]:
        for item in requests:
            for state in item.states:
                assert (item.unit, item.column, state) not in self.asked, "nothing is evaluated twice"
                self.asked.add((item.unit, item.column, state))
        return [self.losses[item.unit, item.column, list(item.states)] for item in requests]


def score_of(problem: ScreenProblem, scores: np.ndarray, truth: np.ndarray, target: float) -> float:
    """What the certified plan of one table costs by another; layers of one group share a width."""
    widths = (*BITS, 16)
    rows = [np.flatnonzero(np.asarray(problem.groups) == name) for name in dict.fromkeys(problem.groups)]
    groups = []
    for members in rows:
        line, weights = scores[members].sum(0), int(problem.params[members].sum())
        options = (Option(BY_BITS[bits], float(line[k]), bits * weights, 0, 0, 0.0) for k, bits in enumerate(widths))
        groups.append(Group("", ("",), tuple(options)))
    choice = solve(groups, [Budget("code_bits", target * float(problem.params.sum()), "average bits")]).options
    taken = zip(rows, choice, strict=True)
    return float(sum(truth[members, widths.index(option.choice.format.weight_bits)].sum() for members, option in taken))


def relaxed(problem: ScreenProblem, scores: np.ndarray, target: float) -> np.ndarray:
    """The screening's own plan of a table: every group's column."""
    names = list(dict.fromkeys(problem.groups))
    members = np.asarray([[name == group for group in names] for name in problem.groups], float)
    costs = (problem.params @ members)[:, None] * np.asarray([*BITS, 16.0])
    return cheapest(members.T @ scores, costs, target * problem.params.sum())


def with_full(scores: np.ndarray) -> np.ndarray:
    return np.concatenate([scores, np.zeros((len(scores), 1))], axis=1)


def exhaustive(problem: ScreenProblem, losses: np.ndarray) -> np.ndarray:
    phases = np.stack([losses[..., problem.phases == phase].mean(-1) for phase in range(10)])
    return with_full(0.75 * losses.mean(-1) + 0.25 * phases.max(0))


def test_ten_times_fewer_evaluations_give_nearly_the_exhaustive_plan() -> None:
    within: list[bool] = []
    for seed in range(3):
        problem, losses = made_up(units=30, states=200, seed=seed)
        evaluator = FakeEvaluator(losses)
        result = Screen(problem, ScreenSettings(), evaluator).run()
        assert len(evaluator.asked) == result.record["evaluations"] <= losses.size / 10
        truth = exhaustive(problem, losses)
        got = with_full(0.75 * result.omega + 0.25 * result.omega_tau)
        for target in (3.0, 4.0, 6.0):
            above = score_of(problem, got, truth, target) / score_of(problem, truth, truth, target) - 1
            assert above <= 0.03
            within.append(above <= 0.01)
    assert np.mean(within) > 0.85


def test_screening_beats_the_predictions_alone() -> None:
    problem, losses = made_up(units=30, states=200, seed=7, spread=0.5)
    result = Screen(problem, ScreenSettings(), FakeEvaluator(losses)).run()
    truth = exhaustive(problem, losses)
    got = with_full(0.75 * result.omega + 0.25 * result.omega_tau)
    best = score_of(problem, truth, truth, 4.0)
    alone = score_of(problem, exhaustive(problem, problem.first_order), truth, 4.0)
    assert score_of(problem, got, truth, 4.0) - best < (alone - best) / 3


def test_a_layer_that_the_prediction_misses_by_far_is_found() -> None:
    problem, losses = made_up(units=30, states=200, seed=4)
    losses[5] *= 20.0
    result = Screen(problem, ScreenSettings(), FakeEvaluator(losses)).run()
    truth = losses.mean(-1)
    np.testing.assert_allclose(result.omega[5, :2], truth[5, :2], rtol=0.3)


@pytest.mark.parametrize("seed", range(4))
def test_the_only_layer_of_its_stage_does_not_take_the_level_of_the_others(seed: int) -> None:
    """Layers that agree closely say nothing of another stage: its layer is evaluated until it is known itself."""
    problem, losses = made_up(units=40, states=64, seed=seed, spread=0.05)
    alone = int(np.argsort(losses[:, 1].mean(-1))[-4])  # its width matters
    losses[alone] *= np.asarray([2.0, 3.0, 1.0])[:, None]
    stages = ["head" if unit == alone else "language" for unit in range(40)]
    result = Screen(replace(problem, stages=stages), ScreenSettings(), FakeEvaluator(losses)).run()
    got = with_full(0.75 * result.omega + 0.25 * result.omega_tau)
    truth = exhaustive(problem, losses)
    for target in (3.0, 4.0, 6.0):
        best = score_of(problem, truth, truth, target)
        assert score_of(problem, got, truth, target) <= 1.01 * best, target


@pytest.mark.parametrize("members", [1, 3])
def test_without_a_cap_it_stops_only_when_the_plans_are_certain(members: int) -> None:
    """Not everything is evaluated even then: a width that no plan takes stays an estimate."""
    problem, losses = made_up(units=12 * members, states=24, seed=5)
    problem = replace(problem, groups=[f"group {index // members}" for index in range(12 * members)])
    evaluator = FakeEvaluator(losses)
    result = Screen(problem, ScreenSettings(cap=1.0), evaluator).run()
    assert result.record["reason"] == "no choice in doubt at any target" and result.record["in_doubt"] == 0
    got = with_full(0.75 * result.omega + 0.25 * result.omega_tau)
    truth = exhaustive(problem, losses)
    for target in (3.0, 4.0, 6.0):
        np.testing.assert_array_equal(relaxed(problem, got, target), relaxed(problem, truth, target))
    assert len(evaluator.asked) < losses.size


@pytest.mark.parametrize("cap", [0.05, 0.07, 0.1, 0.3])
def test_the_cap_is_a_cap(cap: float) -> None:
    problem, losses = made_up(units=20, states=100, seed=2, spread=0.5)
    evaluator = FakeEvaluator(losses)
    record = Screen(problem, ScreenSettings(cap=cap), evaluator).run().record
    assert len(evaluator.asked) == record["evaluations"] <= cap * losses.size
    assert (record["reason"] == "cap on evaluations reached") == (record["in_doubt"] > 0)


def test_a_cap_below_the_first_look_is_refused() -> None:
    check_cap(ScreenSettings(cap=0.02), units=20, bits=BITS, states=100)
    with pytest.raises(BudgetError, match=r"--cap 0.001 allows 6 evaluations, the first look needs 60; use at least"):
        check_cap(ScreenSettings(cap=0.001), units=20, bits=BITS, states=100)


def test_the_same_seed_gives_the_same_table() -> None:
    problem, losses = made_up(units=10, states=50, seed=3)
    one, other = (Screen(problem, ScreenSettings(), FakeEvaluator(losses)).run() for _ in range(2))
    np.testing.assert_array_equal(one.omega, other.omega)


def test_two_harmful_states_and_a_random_one_come_in_turn() -> None:
    predicted = np.asarray([[np.arange(1.0, 41.0)], [10 * np.arange(1.0, 41.0)]])
    order = state_order(predicted, seed=0)
    assert sorted(order) == list(range(40))
    first = order[:20]
    assert set(range(27, 40)) < set(first), "two of three are the most harmful ones that are left"
    assert any(state < 20 for state in first), "and the third is any"


def test_the_radius_weighs_both_scores_and_ends_with_the_last_state() -> None:
    problem, losses = made_up(units=8, states=40, seed=0)
    seen = np.where(np.arange(40) < 4, losses, np.nan)
    one, both = (
        Estimate.of(seen, problem.first_order, replace(problem, alpha=alpha, beta=beta))
        for alpha, beta in ((1.0, 0.0), (1.0, 1.0))
    )
    assert (one.radius > 0).all()
    np.testing.assert_allclose(both.radius / one.radius, 1 + one.omega_tau / one.omega)
    known = Estimate.of(losses, problem.first_order, problem)
    assert not known.radius.any()
    np.testing.assert_allclose(known.omega, losses.mean(-1))


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"targets": ()}, {"cap": 0.0}, {"cap": 1.5}):
        with pytest.raises(BudgetError, match=r"expected a target, and a cap in \(0, 1\]"):
            ScreenSettings(**wrong)  # type: ignore[arg-type]


def test_a_screened_run_gives_a_table_that_allocates(
    policy_folder: Path,
    calibration_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    screened_for: list[ScreenProblem] = []

    class Watched(Screen):
        def __init__(self, problem: ScreenProblem, settings: ScreenSettings, evaluate: Evaluate) -> None:
            screened_for.append(problem)
            super().__init__(problem, settings, evaluate)

    monkeypatch.setattr("calibrator.sensitivity.ledger.Screen", Watched)
    out = tmp_path / "sensitivity.json"
    arguments = ["--policy", str(policy_folder), "--calibration", str(calibration_folder), "--out", str(out)]
    screened = ["--mode", "screened", "--cap", "0.4", "--choices", "w2a16_g32", "w4a16_g32", "w8a16_g32"]
    assert main(["sensitivity", *arguments, *screened]) == 0
    raw = json.loads(out.read_text())
    units = len(raw["units"])
    assert raw["mode"] == "screened" and raw["exact_evaluations"] <= 0.4 * units * 3 * 8
    table = Sensitivity.load(out)
    losses = load_tensors(table, "losses")
    assert np.isfinite(losses["loss"]).all(-1).sum() == raw["exact_evaluations"]
    (problem,) = screened_for
    assert (problem.alpha, problem.beta) == (Objective().alpha, Objective().beta), "what `allocate` minimises"
    assert problem.params.tolist() == [unit.params for unit in table.units]
    assert list(zip(problem.stages, problem.groups, strict=True)) == [(unit.stage, unit.group) for unit in table.units]
    assert problem.bits == BITS and problem.phases.tolist() == losses["phase"].tolist()
    plan = tmp_path / "plan.json"
    assert main(["allocate", "--sensitivity", str(out), "--out", str(plan), "--average-bits", "4"]) == 0
    refused = {
        "budgets other than": ["--average-bits", "5"],
        "budgets other than the average bits": ["--size-gb", "1"],
        "another objective": ["--average-bits", "4", "--alpha", "1"],
        "pins": ["--average-bits", "4", "--pin", "projector.*=w16a16"],
        "a target that runs other formats": ["--average-bits", "4", "--target", "a100"],
    }
    for why, asked in refused.items():
        capsys.readouterr()
        assert main(["allocate", "--sensitivity", str(out), "--out", str(plan), *asked]) == 2
        error = capsys.readouterr().err
        assert f"it does not serve {why}" in error and "screened for plans of 3, 4, 6 bits on average" in error
    assert Plan.load(plan).standing.startswith("optimum of a screened table"), "what was refused replaced nothing"
