"""What the plan does: the allocation, its share per stage, and the curve it lies on."""

from collections.abc import Sequence
from itertools import accumulate

from markupsafe import Markup

from calibrator.allocation.plan import Plan
from calibrator.report.artefacts import Frontier
from calibrator.report.charts_layers import stage_band
from calibrator.report.numbers import byte_unit, in_bytes, significant
from calibrator.report.plan_facts import Alternative, StageShare
from calibrator.report.svg import Scale, Svg, log_scale
from calibrator.sensitivity.table import UnitScores

_WIDTH, _LEFT, _RIGHT = 1080, 64, 1064


def allocation_chart(units: Sequence[UnitScores], plan: Plan) -> Markup:
    """A block per layer in network order: as wide as it has weights, as high as it has bits, so its area is memory."""
    top, bottom = 34, 210
    svg = Svg(_WIDTH, 262, "Bits of every layer in network order")
    used = {0, *(choice.format.weight_bits for choice in plan.assignment.values())}
    y = Scale(0.0, max(used), bottom, top)
    for bits in sorted(used):
        svg.line(_LEFT, y(bits), _RIGHT, y(bits), "grid")
        svg.text(_LEFT - 8, y(bits) + 4, str(bits), "tick", "end")
    svg.text(_LEFT, top - 12, "bits per weight; the width of a block is its layer's share of all weights", "axis")
    total = sum(unit.params for unit in units)
    edges = [_LEFT + (_RIGHT - _LEFT) * count / total for count in accumulate((u.params for u in units), initial=0)]
    for unit, left, right in zip(units, edges, edges[1:], strict=False):
        choice = plan.assignment[unit.name]
        bits = choice.format.weight_bits
        head, packed = y(bits), in_bytes(unit.params * bits / 8)
        tip = f"{unit.name}\n{choice}, {packed} of {in_bytes(unit.params * 2)}"
        gap = 1.0 if right - left > 4 else 0.0
        svg.rect(left, head, right - left - gap, bottom - head, f"b{bits}", tip)
    mean = y(plan.average_bits)
    svg.line(_LEFT, mean, _RIGHT, mean, "mean")
    svg.text(_RIGHT, top - 12, f"dashed: average, {significant(plan.average_bits, 4)} bits", "axis strong", "end")
    stage_band(svg, units, edges, bottom + 12)
    return svg.render()


def stage_chart(stages: Sequence[StageShare]) -> Markup:
    """One bar per stage: the share of its weights in each choice."""
    left, right, pitch = 92, 920, 34
    svg = Svg(1080, 20 + pitch * len(stages), "Share of weights in each format, by stage")
    for index, stage in enumerate(stages):
        y, start = 8 + index * pitch, float(left)
        svg.text(left - 10, y + 16, stage.stage, "label", "end")
        for choice, count in stage.weights_by_choice.items():
            bits = choice.format.weight_bits
            width = (right - left) * count / stage.weights
            tip = f"{stage.stage}\n{choice}  {significant(100 * count / stage.weights)} % of its weights"
            svg.rect(start, y, width - 1 if width > 2 else width, 24, f"b{bits}", tip)
            if width > 46:
                svg.text(start + width / 2, y + 16, f"{100 * count / stage.weights:.0f} %", f"on-b{bits}", "middle")
            start += width
        svg.text(right + 12, y + 16, f"{significant(stage.average_bits)} bits, {in_bytes(stage.size_bytes)}", "label")
    return svg.render()


def frontier_chart(frontier: Frontier, plan: Plan, alternatives: Sequence[Alternative]) -> Markup:
    """Best objective by size; greedy's curve, the plan and the uniform assignments beside it."""
    left, right, top, bottom = 64, 1040, 34, 300
    svg = Svg(_WIDTH, 352, "Best objective by size")
    sizes = [point.size_bits / 8 for point in frontier.points]
    scale, name = byte_unit(max(sizes))
    x = Scale(min(sizes) / scale, max(sizes) / scale, left, right)
    # A logarithmic axis has no place for the full-precision policy's objective, which is 0.
    points = [point for point in frontier.points if point.objective > 0]
    uniform = [
        (item.name, item.size_bytes, item.objective)
        for item in alternatives
        if item.name != "this plan" and item.size_bytes is not None and item.objective
    ]
    values = [point.objective for point in points] + [plan.objective] + [objective for *_, objective in uniform]
    y = log_scale(values, bottom, top)
    svg.y_axis(y, left, right, "objective of Eq. (14), smaller is better (logarithmic)")
    svg.x_axis(x, bottom, f"size of the whole policy in {name}", 8)
    greedy = [(x(point.size_bits / 8 / scale), y(point.greedy_objective)) for point in points if point.greedy_objective]
    svg.polyline(greedy, "curve c-muted")
    svg.polyline([(x(p.size_bits / 8 / scale), y(p.objective)) for p in points], "curve c-accent")
    for point in points:
        tip = (
            f"{in_bytes(point.size_bits / 8, 4)}, {significant(point.average_bits)} bits on average\n"
            f"objective  {significant(point.objective)}"
        )
        if point.greedy_objective is not None:
            tip += f"\ngreedy  {significant(point.greedy_objective)}"
        svg.circle(x(point.size_bits / 8 / scale), y(point.objective), 3.5, "mark s-accent", tip)
    for title, size_bytes, objective in uniform:
        place = x(size_bytes / scale), y(objective)
        svg.circle(*place, 4.5, "hollow", f"{title}\nobjective  {significant(objective)}")
        svg.text(place[0] + 10, place[1] + 3, title, "tick")
    here = x(plan.size.total_bits / 8 / scale), y(plan.objective)
    svg.circle(*here, 7, "here", f"this plan\n{in_bytes(plan.size.total_bits / 8, 4)}\n{significant(plan.objective)}")
    svg.text(here[0] - 4, here[1] + 26, "this plan", "axis strong", "end")
    return svg.render()
