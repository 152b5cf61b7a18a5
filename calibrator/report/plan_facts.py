"""What a plan protects, what that costs, and what a little more or less memory would change."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from calibrator.allocation.options import Group, Option, Pin, build_groups, format_of, scale_bits, totals, weight_bits
from calibrator.allocation.plan import Plan
from calibrator.report.artefacts import Frontier, FrontierPoint
from calibrator.sensitivity.table import Objective, Sensitivity


@dataclass(frozen=True)
class StageShare:
    """One stage of the policy under the plan. weights_by_bits: number of weights at each width."""

    stage: str
    layers: int
    weights: int
    weights_by_bits: dict[int, int]
    size_bytes: float

    @property
    def average_bits(self) -> float:
        return sum(bits * count for bits, count in self.weights_by_bits.items()) / self.weights


@dataclass(frozen=True)
class Protection:
    """A fused group above the smallest width, and what one width less would do to the plan.

    damage: rise of the objective, None where a screened run did not evaluate the plan's signal. saved_bytes: of weights
    and scales. omega: the group's Omega at the lower width, summed over its layers. pinned: its width was not the
    solver's choice.
    """

    group: str
    units: tuple[str, ...]
    stage: str
    bits: int
    lower_bits: int
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
        by_bits = {bits: 0 for bits in sorted(sensitivity.bits)}
        size_bits = 0
        for unit in units:
            fmt = plan.assignment[unit.name]
            by_bits[fmt.weight_bits] += unit.params
            size_bits += weight_bits(unit, fmt, plan.details["float_bits"]) + scale_bits(unit, fmt)
        shares.append(StageShare(stage, len(units), sum(unit.params for unit in units), by_bits, size_bits / 8))
    return shares


def _protections(plan: Plan, sensitivity: Sensitivity, groups: Sequence[Group], pinned: set[str]) -> list[Protection]:
    units = {unit.name: unit for unit in sensitivity.units}
    found = []
    for group in groups:
        bits = plan.assignment[group.units[0]].weight_bits
        place = [option.bits for option in group.options].index(bits)
        if place == 0:
            continue
        here, lower = group.options[place], group.options[place - 1]
        found.append(
            Protection(
                group=group.name,
                units=group.units,
                stage=units[group.units[0]].stage,
                bits=bits,
                lower_bits=lower.bits,
                damage=_known(lower.score - here.score),
                saved_bytes=(here.size_bits - lower.size_bits) / 8,
                omega=sum(units[name].omega[lower.bits] for name in group.units),
                pinned=group.units[0] in pinned,
            )
        )
    return sorted(found, key=lambda item: (-item.bits, item.damage is None, -(item.damage or 0.0)))


def _alternatives(plan: Plan, sensitivity: Sensitivity, groups: Sequence[Group]) -> list[Alternative]:
    params = sum(unit.params for unit in sensitivity.units)
    rows = [Alternative("this plan", plan.average_bits, plan.size.total_bits / 8, plan.objective)]
    if greedy := plan.details["greedy"]:
        rows.append(Alternative("QVLA's greedy demotion, same budget", None, None, greedy["objective"]))
    for bits in sorted(sensitivity.bits, reverse=True):
        choice = [_option(group, bits) for group in groups]
        sums = totals(choice)
        size_bytes = (sums["size_bits"] + plan.size.unquantized_bits) / 8
        name = f"every layer {format_of(sensitivity, bits)}"
        rows.append(Alternative(name, sums["code_bits"] / params, size_bytes, _known(sums["objective"])))
    return rows


def _known(score: float) -> float | None:
    return None if math.isnan(score) else score


def _option(group: Group, bits: int) -> Option:
    return next(option for option in group.options if option.bits == bits)


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
