"""Plans against brute force, budgets at their edges, and costs counted by hand."""

import itertools
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from tables import BY_BITS, random_table, scored, table, unit

from calibrator.allocation.options import Budget, Group, LatencyTable, Option, Pin, build_groups, totals
from calibrator.allocation.plan import Assignment, Plan
from calibrator.allocation.planning import Limits, Planner, PlanRequest, write_frontier
from calibrator.allocation.solve import greedy_demotion, solve
from calibrator.commands.sensitivity import choices_to_measure
from calibrator.quantizers import parse_choice, parse_choices
from calibrator.sensitivity.table import Objective
from vla_policy.core.backends import find_backend
from vla_policy.core.errors import ArtefactError, BudgetError
from vla_policy.core.formats import FULL
from vla_policy.core.targets import TARGETS, find_target, no_kernel


def brute_force(groups: list[Group], budgets: list[Budget]) -> float | None:
    """The best score over all assignments, by trying each."""
    best = None
    for choice in itertools.product(*(group.options for group in groups)):
        if all(sum(option.cost(budget.cost) for option in choice) <= budget.limit for budget in budgets):
            score = sum(option.score for option in choice)
            best = score if best is None else min(best, score)
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fused", [False, True])
def test_highs_equals_brute_force(seed: int, fused: bool) -> None:
    sensitivity = random_table(2 + seed % 5 if not fused else 8, seed, fused)
    groups = build_groups(sensitivity, Objective())
    params = sum(item.params for item in sensitivity.units)
    for average, ratio in ((2.0, 1.0), (3.0, 0.4), (4.7, 0.31), (9.0, 1.0), (16.0, 1.0)):
        budgets = [
            Budget("code_bits", average * params, "average bits", params),
            Budget("bitops", ratio * sum(item.macs for item in sensitivity.units) * 256, "BitOps ratio"),
        ]
        expected = brute_force(groups, budgets)
        if expected is None:
            with pytest.raises(BudgetError):
                solve(groups, budgets)
            continue
        solution = solve(groups, budgets)
        assert solution.objective == pytest.approx(expected, abs=1e-12)
        assert solution.gap == pytest.approx(0.0, abs=1e-9)
        assert all(sum(option.cost(row.cost) for option in solution.options) <= row.limit for row in budgets)


@pytest.mark.parametrize("seed", range(4))
def test_eight_units_equal_brute_force(seed: int) -> None:
    sensitivity = random_table(8, seed)
    groups = build_groups(sensitivity, Objective())
    budgets = [Budget("code_bits", 4.0 * sum(item.params for item in sensitivity.units), "average bits")]
    expected = brute_force(groups, budgets)
    assert solve(groups, budgets).objective == pytest.approx(expected, abs=1e-12)
    ecos = solve(groups, budgets, "ECOS_BB")
    assert expected is not None and ecos.objective >= expected - 1e-12
    assert ecos.bound <= expected + 1e-9
    greedy = greedy_demotion(groups, budgets)
    assert greedy is not None and greedy.objective >= expected - 1e-12
    assert sum(option.code_bits for option in greedy.options) <= budgets[0].limit


def test_a_budget_met_exactly_is_met_and_one_bit_less_is_not() -> None:
    groups = build_groups(random_table(6, 1), Objective())
    least = sum(min(option.code_bits for option in group.options) for group in groups)
    exact = solve(groups, [Budget("code_bits", least, "bits")])
    assert totals(exact.options)["code_bits"] == least
    with pytest.raises(BudgetError, match=f"bits {least - 1} is below the minimum {least};"):
        solve(groups, [Budget("code_bits", least - 1, "bits")])


def test_budgets_that_cannot_be_met_together_are_refused() -> None:
    cheap_size = Option(BY_BITS[2], 1.0, 20, 20, 900, 0.0)
    cheap_ops = Option(BY_BITS[8], 0.5, 80, 80, 100, 0.0)
    group = Group("layer", ("layer",), (cheap_size, cheap_ops))
    with pytest.raises(BudgetError, match="average bits and BitOps ratio cannot be met together"):
        solve([group], [Budget("code_bits", 50, "average bits"), Budget("bitops", 500, "BitOps ratio")])


def test_greedy_takes_the_cheapest_step_and_stops_at_the_budget() -> None:
    calm, fragile = unit("calm", {2: 0.03, 4: 0.02, 8: 0.01}), unit("fragile", {2: 9.0, 4: 5.0, 8: 3.0})
    groups = build_groups(table([calm, fragile]), Objective(1.0, 0.0))
    params = calm.params
    solution = greedy_demotion(groups, [Budget("code_bits", 18 * params, "bits")])
    assert solution is not None
    assert [option.choice for option in solution.options] == [BY_BITS[2], BY_BITS[16]]
    assert greedy_demotion(groups, [Budget("code_bits", 3 * params, "bits")]) is None


def test_objectives_read_their_own_scores() -> None:
    item = unit("layer", {2: 0.8, 4: 0.4, 8: 0.2})
    assert Objective(0.75, 0.25).score(item, BY_BITS[4]) == pytest.approx(0.75 * 0.4 + 0.25 * 0.8)
    assert Objective(signal="action").score(item, BY_BITS[4]) == pytest.approx(0.04)
    assert Objective(signal="proxy").score(item, BY_BITS[4]) == pytest.approx(0.02)


def test_a_width_that_a_screened_run_did_not_evaluate_is_not_solved_for() -> None:
    known, partly = unit("known", {2: 0.8, 4: 0.4, 8: 0.2}), unit("partly", {2: 0.8, 4: 0.4, 8: 0.2})
    screened = table([known, replace(partly, action_mse={BY_BITS[2]: 0.08, FULL: 0.0})])
    by_action = replace(request(average_bits=8.0), objective=Objective(signal="action"))
    with pytest.raises(ArtefactError, match="partly: w4a16_g32:rtn has no score by this signal"):
        Planner.of(screened, by_action).plan()
    pinned = Planner.of(screened, replace(by_action, pins=(Pin("partly", BY_BITS[2]),))).plan()
    assert pinned.objective == pytest.approx(0.08 + 0.02)  # the other layer has room for 8 bits


def test_costs_are_counted_with_scales_and_activations() -> None:
    item = unit("layer", {2: 0.8, 4: 0.4, 8: 0.2}, inputs=70, outputs=10)
    (group,) = build_groups(table([item]), Objective(), float_bits=32)
    four, full = group.options[1], group.options[3]
    assert (four.code_bits, four.size_bits) == (2800, 2800 + 3 * 10 * 16)  # 70 inputs: groups of 32, 32 and 6
    assert (full.code_bits, full.size_bits) == (700 * 16, 700 * 32)
    assert four.bitops == item.macs * 4 * 16
    both = scored("layer", {parse_choice("w4a4_g32"): 0.4, FULL: 0.0}, inputs=70, outputs=10)
    (group,) = build_groups(table([both]), Objective())
    assert group.options[0].bitops == item.macs * 4**2


def request(**limits: float) -> PlanRequest:
    return PlanRequest(Limits(**limits))


def test_plan_adds_up_and_survives_a_round_trip(tmp_path: Path) -> None:
    sensitivity = random_table(7, 3, fused=True)
    plan = Planner.of(sensitivity, request(average_bits=4.0)).plan()
    params = {item.name: item.params for item in sensitivity.units}
    assert plan.average_bits <= 4.0
    assert plan.average_bits == pytest.approx(
        sum(params[name] * choice.format.weight_bits for name, choice in plan.assignment.items()) / sum(params.values())
    )
    bits = {name: choice.format.weight_bits for name, choice in plan.assignment.items()}
    assert plan.size.weight_bits == sum(params[name] * bits[name] for name in params)
    assert plan.size.unquantized_bits == 16_000
    for first in range(0, 6, 2):
        assert plan.assignment[f"layer_{first}"] == plan.assignment[f"layer_{first + 1}"]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    raw = json.loads((tmp_path / "plan.json").read_text())
    assert raw["size_bits"] == raw["weight_bits"] + raw["scale_bits"] + raw["unquantized_bits"]
    assert raw["assignment"]["layer_0"] == plan.assignment["layer_0"].to_json()


def test_size_budget_covers_everything_in_the_engine() -> None:
    sensitivity = random_table(6, 5)
    low = Planner.of(sensitivity, request(average_bits=2.0)).plan().size.total_bits
    high = Planner.of(sensitivity, request(average_bits=16.0)).plan().size.total_bits
    middle = (low + high) / 2
    plan = Planner.of(sensitivity, request(size_gb=middle / 8e9)).plan()
    assert low <= plan.size.total_bits <= middle
    with pytest.raises(BudgetError, match="tensors that are not quantized"):
        Planner.of(sensitivity, request(size_gb=1e-9)).plan()


def test_bitops_ratio_is_relative_to_16_bits() -> None:
    sensitivity = random_table(5, 6)
    plan = Planner.of(sensitivity, request(bitops_ratio=0.3)).plan()
    assert plan.bitops <= 0.3 * 256 * sum(item.macs for item in sensitivity.units)


def latency_table(sensitivity_units: tuple[str, ...], tmp_path: Path) -> Path:
    costs = {"w2a16_g32": 3.0, "w4a16_g32": 1.0, "w8a16_g32": 2.0, "w16a16": 4.0}
    path = tmp_path / "costs.json"
    content = {"schema_version": 2, "kind": "cost_table", "target": "cpu", "policy_sha256": "p" * 64, "fixed_ms": 5.0}
    ran = {"backend": "openvino", "threads": 2}
    path.write_text(json.dumps(content | ran | {"units": {name: costs for name in sensitivity_units}}))
    return path


def test_latency_budget_uses_the_measured_table(tmp_path: Path) -> None:
    sensitivity = random_table(4, 7)
    path = latency_table(tuple(item.name for item in sensitivity.units), tmp_path)
    costs = LatencyTable.load(path, "p" * 64)
    limits = Limits(latency_ms=5.0 + 4 * 1.0)
    plan = Planner.of(sensitivity, PlanRequest(limits, latency=costs)).plan()
    # Only 4 bits everywhere is fast enough: 2 bits are slower on this target.
    assert set(plan.assignment.values()) == {BY_BITS[4]}
    assert plan.latency_ms == pytest.approx(9.0) and (plan.target, plan.backend) == ("cpu", "openvino")
    assert plan.details["latency_threads"] == 2
    plan.save(tmp_path / "plan.json")
    assert Assignment.load(tmp_path / "plan.json", plan.policy_sha256, list(plan.assignment)).backend == "openvino"
    with pytest.raises(ArtefactError, match="target a100 cannot run backend openvino"):
        Planner.of(sensitivity, PlanRequest(limits, latency=costs, target="a100"))
    with pytest.raises(BudgetError, match="5 ms that no plan can change"):
        Planner.of(sensitivity, PlanRequest(Limits(latency_ms=4.0), latency=costs)).plan()
    with pytest.raises(BudgetError, match="--latency-table"):
        Planner.of(sensitivity, request(latency_ms=9.0)).plan()
    with pytest.raises(ArtefactError, match="measured for the policy pppp"):
        LatencyTable.load(path, "q" * 64)
    partial = replace(costs, units={"layer_0": costs.units["layer_0"]})
    with pytest.raises(ArtefactError, match="no entry for layer_1 in w2a16_g32"):
        Planner.of(sensitivity, PlanRequest(limits, latency=partial))


def test_only_formats_of_the_target_are_chosen(tmp_path: Path) -> None:
    sensitivity = random_table(6, 9)
    anywhere = Planner.of(sensitivity, request(average_bits=6.0)).plan()
    on_a100 = Planner.of(sensitivity, replace(request(average_bits=6.0), target="a100")).plan()
    target = find_target("a100")
    assert all(target.why_not(choice.format) is None for choice in on_a100.assignment.values())
    assert on_a100.scored_by == {parse_choice("w8a16:rtn"): BY_BITS[8]} and anywhere.scored_by == {}
    eight = next(name for name, choice in on_a100.assignment.items() if choice == parse_choice("w8a16:rtn"))
    assert on_a100.measured(eight) == BY_BITS[8]
    on_a100.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == on_a100
    with pytest.raises(ArtefactError, match="target 'toaster' is unknown"):
        Planner.of(sensitivity, replace(request(average_bits=6.0), target="toaster"))


@pytest.mark.parametrize("name", TARGETS)
def test_every_release_is_offered_what_it_runs(name: str) -> None:
    """Formats that were measured and that a release lacks give way to its own, never to none."""
    target, tight = find_target(name), replace(request(average_bits=4.5), target=name)
    plan = Planner.of(random_table(6, 9), tight).plan()
    assert {target.why_not(choice.format) for choice in plan.assignment.values()} == {None}
    assert min(choice.format.weight_bits for choice in plan.assignment.values()) <= 4


def test_a_width_that_the_target_lacks_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    sensitivity = random_table(6, 9)
    backend = find_backend("onnxruntime")
    wide = tuple(rule for rule in backend.rules((1, 31)) if rule.weight_bits >= 8)
    monkeypatch.setattr(type(backend), "rules", lambda self, version: wide)
    only_wide = find_target("cpu")
    groups = build_groups(sensitivity, request(average_bits=6.0).objective, target=only_wide)
    assert {option.choice for group in groups for option in group.options} == {BY_BITS[8], FULL}
    with pytest.raises(BudgetError, match="pinned to w4a16_g32:rtn, which the target cannot run"):
        build_groups(sensitivity, request(average_bits=6.0).objective, (Pin("layer_0", BY_BITS[4]),), target=only_wide)


def test_some_layers_keep_16_bits_unless_they_are_pinned() -> None:
    sensitivity = random_table(6, seed=3)
    sensitivity.meta["kept"] = ["layer_1", "layer_4"]
    plan = Planner.of(sensitivity, request(average_bits=8.0)).plan()
    assert plan.assignment["layer_1"] == plan.assignment["layer_4"] == FULL
    assert plan.details["kept"] == ["layer_1", "layer_4"]
    pinned = Planner.of(sensitivity, replace(request(average_bits=8.0), pins=(Pin("layer_1", BY_BITS[4]),))).plan()
    assert pinned.assignment["layer_1"] == BY_BITS[4] and pinned.assignment["layer_4"] == FULL
    assert pinned.details["kept"] == ["layer_4"]


def test_pins_hold_and_bad_ones_are_named() -> None:
    sensitivity = random_table(6, 8, fused=True)
    pinned = replace(request(average_bits=9.0), pins=(Pin.parse("layer_0=w16a16"),))
    plan = Planner.of(sensitivity, pinned).plan()
    assert plan.assignment["layer_0"] == plan.assignment["layer_1"] == FULL
    for pins, message in (
        (("layer_9=w4a16_g32:rtn",), "matches no layer"),
        (("layer_0=w4a16:rtn",), "w4a16:rtn was not measured; choose from w2a16_g32:rtn, "),
        (("layer_0=w4a16_g32:rtn", "layer_1=w8a16_g32:rtn"), "fused and share one choice"),
        (("layer_0=w4a16_g32:rtn", "layer_*=w8a16_g32:rtn"), "pinned to w4a16_g32:rtn and to w8"),
    ):
        with pytest.raises(BudgetError, match=message):
            Planner.of(sensitivity, replace(pinned, pins=tuple(map(Pin.parse, pins))))
    with pytest.raises(BudgetError, match="glob=choice"):
        Pin.parse("layer_0")
    with pytest.raises(BudgetError, match="unpin layers"):
        Planner.of(sensitivity, replace(request(average_bits=3.0), pins=(Pin.parse("*=w16a16"),))).plan()


def test_no_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match="no budget given"):
        Planner.of(random_table(2, 0), request()).plan()


def test_frontier_falls_as_size_grows_and_ends_at_full_precision(tmp_path: Path) -> None:
    planner = Planner.of(random_table(10, 9), request(average_bits=4.0))
    curve = planner.frontier(9)
    scores = [point["objective"] for point in curve]
    assert scores == sorted(scores, reverse=True)
    assert curve[-1]["objective"] == 0.0
    assert curve[0]["size_bits"] < curve[-1]["size_bits"]
    assert all(sum(point["layers_by_choice"].values()) == 10 for point in curve)
    assert all(point["greedy_objective"] is None or point["greedy_objective"] >= point["objective"] for point in curve)
    write_frontier(tmp_path / "frontier.json", planner, 3)
    assert len(json.loads((tmp_path / "frontier.json").read_text())["points"]) == 3


def test_formats_without_a_kernel_are_marked_and_may_be_planned() -> None:
    """As the papers' W4A4: it can be measured, and nobody is left to think that it runs."""
    bare, real = parse_choices(("w4a4_g32:rtn", "w4a16_g64:rtn"))
    assert set(no_kernel((bare, real), None)) == set(no_kernel((bare, real), "cpu")) == {"w4a4_g32:rtn"}
    simulated = table([scored("layer", {bare: 0.4, FULL: 0.0})])
    plan = Planner.of(simulated, request(average_bits=4.0)).plan()
    assert plan.assignment["layer"] == bare and set(plan.details["no_kernel"]) == {"w4a4_g32:rtn"}
    kept = Planner.of(simulated, request(average_bits=16.0)).plan()
    assert kept.assignment["layer"] == FULL and kept.details["no_kernel"] == {}


def test_formats_that_save_memory_and_no_time_are_named() -> None:
    """On a CPU 2 and 8 bits with 16-bit activations are dequantized at every call; 4 bits in groups are not."""
    slow_ones, others = ("w8a16_g64", "w2a16_g64", "w4a16"), ("w4a16_g64", "w4a8_g64")
    for text in (*slow_ones, *others):
        choice = parse_choice(text)
        one = table([scored("layer", {choice: 0.1, FULL: 0.0}, inputs=512)])
        plan = Planner.of(one, replace(request(average_bits=8.0), target="cpu")).plan()
        assert plan.details["memory_only"] == ([str(choice)] if text in slow_ones else []), text


def test_a_plan_names_what_runs_in_the_place_of_what_was_measured() -> None:
    (measured,) = parse_choices(("w2a16_g256:rtn",))
    one = table([scored("layer", {measured: 0.4, FULL: 0.0}, inputs=512)])
    plan = Planner.of(one, replace(request(average_bits=2.0), target="cpu")).plan()
    (runs,) = plan.fallbacks
    assert plan.fallbacks[runs] == measured and str(runs) == "w2a16_g128:rtn" == str(plan.assignment["layer"])
    exact = Planner.of(one, request(average_bits=2.0)).plan()
    assert exact.fallbacks == {} and exact.standing == "certified optimum"


def test_a_plan_keeps_the_fixed_scales_that_were_scored_and_says_what_was_scored_otherwise(tmp_path: Path) -> None:
    eight = parse_choice("w8a8:rtn")
    layers = [scored(name, {eight: 0.1, FULL: 0.0}) for name in ("a", "b")]
    plain = table(layers)
    peaks = {"input_peaks": {"a": 3.0, "b": 5.0}}
    fixed = replace(plain, meta={**plain.meta, **peaks, "target": "orin-jp6"})
    asked = replace(request(average_bits=12.0), target="orin-jp6", pins=(Pin("a", eight), Pin("b", FULL)))
    plan = Planner.of(fixed, asked).plan()
    assert plan.input_peaks == {"a": 3.0} and plan.details["other_rounding"] == {}
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    read = Assignment.load(tmp_path / "plan.json", plain.policy_sha256, ["a", "b"])
    assert (read.target, read.input_peaks) == ("orin-jp6", {"a": 3.0})
    token = Planner.of(replace(plain, meta={**plain.meta, **peaks}), asked).plan()
    rules = "scored per token, orin-jp6 rounds per tensor, fixed"
    assert token.details["other_rounding"] == {"w8a8:rtn": rules} and token.input_peaks == {"a": 3.0}
    on_cpu = Planner.of(fixed, replace(asked, target="cpu")).plan()
    assert on_cpu.details["other_rounding"] == {"w8a8:rtn": "scored per tensor, fixed, cpu rounds per token"}
    assert on_cpu.input_peaks == {}
    assert Planner.of(fixed, replace(asked, target=None)).plan().input_peaks == {}


def test_a_target_says_what_is_usually_measured() -> None:
    asked = Namespace(choices=None, target=None)
    assert [str(one.format) for one in choices_to_measure(asked)] == ["w2a16_g64", "w4a16_g64", "w8a16_g64"]
    asked.target = "cpu"
    assert {str(one.format) for one in choices_to_measure(asked)} >= {"w2a16_g64", "w4a8_g64", "w8a8_g64"}
    asked.choices = ["w16a16", "w8a8"]
    assert FULL in choices_to_measure(asked)
