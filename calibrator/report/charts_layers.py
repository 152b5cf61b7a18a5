"""Which layers are fragile: the paper's Fig. 2."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from markupsafe import Markup

from calibrator.allocation.plan import Plan
from calibrator.report.labels import Labels
from calibrator.report.numbers import significant
from calibrator.report.svg import Scale, Svg, linear_scale, log_scale
from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.table import UnitScores
from vla_policy.core.formats import FULL, Choice

STAGES = ("vision", "projector", "language", "head")
_WIDTH, _LEFT, _RIGHT = 1080, 64, 1064


def layer_chart(units: Sequence[UnitScores], choices: Sequence[Choice], plan: Plan | None) -> Markup:
    """Omega of every layer in network order in every measured choice; a ring marks the one that the plan took.

    choices: those below full precision.
    """
    top, bottom = 34, 300
    svg = Svg(_WIDTH, 352, "Sensitivity of every layer in network order")
    y = log_scale((unit.omega[choice] for unit in units for choice in choices), bottom, top)
    svg.y_axis(y, _LEFT, _RIGHT, "Ω, task-evidence sensitivity (logarithmic)")
    step = (_RIGHT - _LEFT) / len(units)
    radius = float(np.clip(step * 0.32, 1.6, 4.2))
    for index, unit in enumerate(units):
        x = _LEFT + (index + 0.5) * step
        marks = [y(unit.omega[choice]) for choice in choices]
        svg.line(x, min(marks), x, max(marks), f"stem s-{unit.stage}")
        for choice, mark in zip(choices, marks, strict=True):
            svg.circle(x, mark, radius, f"dot s-{unit.stage} w{choice.format.weight_bits}")
        if plan:
            _mark_choice(svg, x, plan.measured(unit.name), unit, y, radius)
        svg.rect(x - step / 2, top, step, bottom - top, "hit", _layer_tip(unit, choices, plan))
    stage_band(svg, units, [_LEFT + index * step for index in range(len(units) + 1)], bottom + 12)
    return svg.render()


def _mark_choice(svg: Svg, x: float, chosen: Choice, unit: UnitScores, y: Scale, radius: float) -> None:
    if chosen != FULL:
        svg.circle(x, y(unit.omega[chosen]), radius + 2.2, "ring")
    else:
        svg.polygon([(x - radius - 1, y.start), (x + radius + 1, y.start), (x, y.start - 2 * radius - 2)], "kept")


def _layer_tip(unit: UnitScores, choices: Sequence[Choice], plan: Plan | None) -> str:
    label = Labels.of(choices)
    scores = [f"Ω in {label(choice)}  {significant(unit.omega[choice])}" for choice in choices]
    chosen = [f"plan  {plan.assignment[unit.name]}"] if plan else []
    return "\n".join([unit.name, f"{unit.params:,} weights", *scores, *chosen])


def stage_band(svg: Svg, units: Sequence[UnitScores], edges: Sequence[float], y: float) -> None:
    """A coloured band under a chart whose layer i spans edges[i] to edges[i + 1]; its parts are named."""
    start = 0
    for (stage, track), layers in groupby(units, key=lambda unit: (unit.stage, unit.track)):
        count = len(list(layers))
        left, right = edges[start], edges[start + count]
        svg.rect(left + 0.5, y, right - left - 1, 5, f"s-{stage}", "\n".join([track, f"{count} layers"]))
        if right - left > 7 * len(track):
            svg.text((left + right) / 2, y + 22, track, "tick", "middle")
        start += count


def boundary_chart(units: Sequence[UnitScores], choice: Choice, label: str) -> Markup:
    """Mean loss at each boundary and mean action error, by the stage whose layers are quantized (Fig. 2a).

    The means are over the layers that were evaluated in `choice`.
    """
    stages = [stage for stage in STAGES if any(unit.stage == stage for unit in units)]
    evaluated = {stage: [unit for unit in units if unit.stage == stage and unit.evaluated(choice)] for stage in stages}
    known = {stage: layers for stage, layers in evaluated.items() if layers}
    losses = {
        stage: {name: float(np.mean([unit.boundary_loss[choice][name] for unit in layers])) for name in BOUNDARIES}
        for stage, layers in known.items()
    }
    errors = {stage: float(np.mean([unit.action_mse[choice] for unit in layers])) for stage, layers in known.items()}
    svg = Svg(530, 380, f"Loss at each boundary and action error by quantized stage, {label}")
    left, right = 64, 522
    upper = linear_scale((value for row in losses.values() for value in row.values()), 210, 34)
    lower = linear_scale(errors.values(), 340, 268)
    svg.y_axis(upper, left, right, f"mean evidence loss per layer, {label}", 4)
    svg.y_axis(lower, left, right, "mean action error (normalised, squared)", 2)
    column = (right - left) / len(stages)
    for index, stage in enumerate(stages):
        x, bar = left + index * column + column * 0.14, column * 0.72 / len(BOUNDARIES)
        svg.text(x + column * 0.36, 362, stage, "tick", "middle")
        if stage not in known:
            for base in (upper.start, lower.start):
                svg.text(x + column * 0.36, base - 8, "not evaluated", "tick", "middle")
            continue
        for place, name in enumerate(BOUNDARIES):
            value, head = losses[stage][name], upper(losses[stage][name])
            tip = f"{stage} layers in {label}\nloss at the {name} boundary  {significant(value)}"
            svg.rect(x + place * bar, head, bar - 1.5, upper.start - head, f"s-{name}", tip)
        head = lower(errors[stage])
        tip = f"{stage} layers in {label}\naction error  {significant(errors[stage])}"
        svg.rect(x + column * 0.21, head, column * 0.3, lower.start - head, "error", tip)
    svg.line(left, upper.start, right, upper.start, "base")
    svg.line(left, lower.start, right, lower.start, "base")
    return svg.render()


def error_chart(units: Sequence[UnitScores], choice: Choice, label: str) -> Markup:
    """Omega of every layer that was evaluated in `choice` against its action error.

    Where the two disagree, an action-only score misses damage.
    """
    known = [unit for unit in units if unit.evaluated(choice)]
    svg = Svg(530, 380, f"Evidence sensitivity against action error, {label}")
    left, right, top, bottom = 70, 518, 34, 322
    untouched = any(unit.action_mse[choice] == 0 for unit in known)
    start = left + (40 if untouched else 0)
    x = log_scale((unit.action_mse[choice] for unit in known), start, right)
    y = log_scale((unit.omega[choice] for unit in known), bottom, top)
    svg.y_axis(y, left, right, f"Ω, {label} (logarithmic)")
    svg.x_axis(x, bottom, "action error (normalised, squared, logarithmic)", 4)
    if untouched:
        svg.text(left + 14, bottom + 18, "0", "tick", "middle")
        svg.line(start - 10, top, start - 10, bottom, "grid")
    if len(known) < len(units):
        svg.text(right, top - 12, f"{len(units) - len(known)} of {len(units)} layers not evaluated", "axis", "end")
    for unit in known:
        omega, error = unit.omega[choice], unit.action_mse[choice]
        tip = f"{unit.name}\nΩ  {significant(omega)}\naction error  {significant(error)}"
        svg.circle(x(error) if error > 0 else left + 14, y(omega), 4.5, f"mark s-{unit.stage}", tip)
    return svg.render()


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rho with mean ranks for ties; NaN where either is constant, as with fewer than two values."""
    if len(first) < 2:
        return float("nan")
    ranks = [_mean_ranks(np.asarray(values, np.float64)) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum() / scale) if scale else float("nan")


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    ordered = np.sort(values)
    first, last = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return (first + last - 1) / 2


def disagreement(units: Sequence[UnitScores], choice: Choice, count: int) -> list[str]:
    """Layers among the `count` most fragile by evidence that are not among the `count` worst by action error.

    All of `units` must have been evaluated in `choice`.
    """
    by_evidence = sorted(units, key=lambda unit: -unit.omega[choice])[:count]
    by_action = {unit.name for unit in sorted(units, key=lambda unit: -unit.action_mse[choice])[:count]}
    return [unit.label for unit in by_evidence if unit.name not in by_action]
