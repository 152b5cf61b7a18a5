"""What a plan protects, what that costs, and what a little more or less memory would change."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from calibrator.allocation.options import Group, Option, Pin, added_bits, build_groups, ladder, totals, weight_bits
from calibrator.allocation.plan import Plan
from calibrator.report.artefacts import Frontier, FrontierPoint
from calibrator.report.labels import Labels
from calibrator.sensitivity.table import Objective, Sensitivity
from vla_policy.core.formats import Choice


@dataclass(frozen=True)
class StageShare:
    """One stage of the policy under the plan. weights_by_choice: number of weights in each."""

    stage: str
    layers: int
    weights: int
    weights_by_choice: dict[Choice, int]
    size_bytes: float

    @property
    def average_bits(self) -> float:
        bits = sum(choice.format.weight_bits * count for choice, count in self.weights_by_choice.items())
        return bits / self.weights


@dataclass(frozen=True)
class Protection:
    """A fused group above the fewest bits, and what one step down would do to the plan.

    lower: the best choice of the next fewer bits. damage: rise of the objective, None where a screened run did not
    evaluate the plan's signal. saved_bytes: of weights and scales. omega: the group's Omega in the lower choice, summed
    over its layers. pinned: it was not the solver's choice.
    """

    group: str
    label: str
    units: tuple[str, ...]
    stage: str
    choice: Choice
    lower: Choice
    damage: float | None
    saved_bytes: float
    omega: float
    pinned: bool


@dataclass(frozen=True)
class Alternative:
    """Another assignment on the same table. size_bytes: everything in the engine; None where unknown.

    objective: None where a screened run did not evaluate the plan's signal for all layers.
    """

    name: str
    average_bits: float | None
    size_bytes: float | None
    objective: float | None


@dataclass(frozen=True)
class Exchange:
    """What a different budget would buy: the curve's best plan that fits into the plan's size plus `extra_bytes`."""

    extra_bytes: float
    size_bytes: float
    average_bits: float
    objective: float


@dataclass(frozen=True)
class PlanFacts:
    """Everything that the page says about a plan. full_bytes: the same policy with every layer at full precision."""

    stages: tuple[StageShare, ...]
    protections: tuple[Protection, ...]
    alternatives: tuple[Alternative, ...]
    size_bytes: float
    full_bytes: float
    average_budget: float | None


def plan_facts(plan: Plan, sensitivity: Sensitivity) -> PlanFacts:
    """From the plan and the table that it was made from."""
    objective = Objective(plan.alpha, plan.beta, plan.details["signal"])
    float_bits = plan.details["float_bits"]
    groups = build_groups(sensitivity, objective, (), float_bits)
    pinned = {
        unit
        for pin in map(Pin.parse, plan.details["pins"])
        for group in build_groups(sensitivity, objective, (pin,), float_bits)
        if len(group.options) == 1
        for unit in group.units
    }
    full = [group.options[-1] for group in groups]
    return PlanFacts(
        stages=tuple(_stages(plan, sensitivity)),
        protections=tuple(_protections(plan, sensitivity, groups, pinned)),
        alternatives=tuple(_alternatives(plan, sensitivity, groups)),
        size_bytes=plan.size.total_bits / 8,
        full_bytes=(totals(full)["size_bits"] + plan.size.unquantized_bits) / 8,
        average_budget=plan.details["average_bits_budget"],
    )


def _stages(plan: Plan, sensitivity: Sensitivity) -> list[StageShare]:
    shares = []
    for stage in dict.fromkeys(unit.stage for unit in sensitivity.units):
        units = [unit for unit in sensitivity.units if unit.stage == stage]
        by_choice = {choice: 0 for choice in planned_choices(plan)}
        size_bits = 0
        for unit in units:
            choice = plan.assignment[unit.name]
            by_choice[choice] += unit.params
            size_bits += weight_bits(unit, choice.format, plan.details["float_bits"])
            size_bits += added_bits(unit.outputs, unit.inputs, choice)
        shares.append(StageShare(stage, len(units), sum(unit.params for unit in units), by_choice, size_bits / 8))
    return shares


def _protections(plan: Plan, sensitivity: Sensitivity, groups: Sequence[Group], pinned: set[str]) -> list[Protection]:
    units = {unit.name: unit for unit in sensitivity.units}
    found = []
    for group in groups:
        here = _option(group, plan.measured(group.units[0]))
        lower = next((option for option in ladder(group) if option.code_bits < here.code_bits), None)
        if lower is None:
            continue
        found.append(
            Protection(
                group=group.name,
                label=_joined_labels([units[name].label for name in group.units]),
                units=group.units,
                stage=units[group.units[0]].stage,
                choice=plan.assignment[group.units[0]],
                lower=lower.choice,
                damage=_known(lower.score - here.score),
                saved_bytes=(here.size_bits - lower.size_bits) / 8,
                omega=sum(units[name].omega[lower.choice] for name in group.units),
                pinned=group.units[0] in pinned,
            )
        )
    return sorted(
        found, key=lambda item: (-item.choice.format.weight_bits, item.damage is None, -(item.damage or 0.0))
    )


def _joined_labels(labels: Sequence[str]) -> str:
    """Labels of fused layers, with their common parent once: `layers.0.self_attn.q_proj, k_proj`."""
    first, *others = labels
    parent = first.rpartition(".")[0]
    return ", ".join([first, *(label.removeprefix(f"{parent}.") for label in others)])


def _alternatives(plan: Plan, sensitivity: Sensitivity, groups: Sequence[Group]) -> list[Alternative]:
    params = sum(unit.params for unit in sensitivity.units)
    rows = [Alternative("this plan", plan.average_bits, plan.size.total_bits / 8, plan.objective)]
    if greedy := plan.details["greedy"]:
        rows.append(Alternative("QVLA's greedy demotion, same budget", None, None, greedy["objective"]))
    label = Labels.of(sensitivity.choices)
    for choice in reversed(sensitivity.choices):
        sums = totals([_option(group, choice) for group in groups])
        size_bytes = (sums["size_bits"] + plan.size.unquantized_bits) / 8
        name = f"every layer {label(choice)}"
        rows.append(Alternative(name, sums["code_bits"] / params, size_bytes, _known(sums["objective"])))
    return rows


def _known(score: float) -> float | None:
    return None if math.isnan(score) else score


def _option(group: Group, choice: Choice) -> Option:
    return next(option for option in group.options if option.choice == choice)


def planned_choices(plan: Plan) -> list[Choice]:
    """What the plan's layers are, the least precise first."""
    return sorted(set(plan.assignment.values()), key=lambda choice: choice.precision)


def exchanges(frontier: Frontier, plan: Plan, unit_bytes: float) -> list[Exchange]:
    """Budgets up to two `unit_bytes` below and four above the plan's size, where the curve reaches that far.

    The curve has few points: a larger budget whose best point is no better than the plan is left out.
    """
    size_bytes = plan.size.total_bits / 8
    found = []
    for factor in (-2, -1, 1, 2, 4):
        point = _within(frontier.points, size_bytes + factor * unit_bytes)
        if point is not None and (factor < 0 or point.objective < plan.objective):
            found.append(Exchange(factor * unit_bytes, point.size_bits / 8, point.average_bits, point.objective))
    return found


def _within(points: Sequence[FrontierPoint], size_bytes: float) -> FrontierPoint | None:
    """The best point that fits into `size_bytes`; None where the curve ends before."""
    fitting = [point for point in points if point.size_bits / 8 <= size_bytes <= points[-1].size_bits / 8]
    return min(fitting, key=lambda point: point.objective) if fitting else None
