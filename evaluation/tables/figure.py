"""A section's finished runs as a drawing: success against bytes of weights, one curve per method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calibrator.report.svg import Scale, Svg
from evaluation.actors import ActorSpec
from evaluation.statistics import wilson_interval
from evaluation.tables.arms import Arm
from evaluation.tables.config import PlannedRun, Section
from evaluation.tables.markdown import Row

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 56, 520, 48, 380
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#117733", "#882255")
"""Told apart by most people who confuse red and green."""
_STYLE = """
text { font: 12px sans-serif; fill: #333 } .axis { font-weight: bold } .grid { stroke: #ddd } .base { stroke: #333 }
.reference { stroke: #333; stroke-dasharray: 5 4 } .band { fill: #333; opacity: 0.08 } polyline { fill: none }
polyline, .interval { stroke-width: 1.6 }
"""


@dataclass(frozen=True)
class _Point:
    megabytes: float
    successes: int
    trials: int

    @property
    def rate(self) -> float:
        return 100 * self.successes / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        found = wilson_interval(self.successes, self.trials)
        return 100 * found.low, 100 * found.high


def curve_of(run: PlannedRun) -> str:
    """The method of a run, whatever its bytes: runs of one name are one curve."""
    arm, actor = run.arm, run.rollout.actor
    alike = arm.uniform if arm else actor.uniform if isinstance(actor, ActorSpec) else None
    before = f"{arm.transform}, " if arm and arm.transform else ""
    if alike is not None:
        return f"{before}uniform {alike.recipe or alike.format}"
    if arm is None:
        return run.name
    usual = arm.signal != "evidence" or (arm.alpha, arm.beta) == (Arm.alpha, Arm.beta)
    by = f"plan by {arm.signal}" if usual else f"plan by {arm.signal} {arm.alpha:g}, {arm.beta:g}"
    return before + by + (f", {arm.method}" if arm.method else "")


def draw(section: Section, rows: Mapping[str, Row]) -> str:
    """A standalone SVG of the runs that `rows` (by `section-run`) holds, with 95 % Wilson intervals.

    The first run is the reference: a line with its interval. Hovering over a point tells the run and its counts.
    """
    have = [(run, rows[slug]) for run in section.runs if (slug := f"{section.name}-{run.name}") in rows]
    points = {run.name: _point(row) for run, row in have}
    curves: dict[str, list[PlannedRun]] = {}
    for run, _ in have[1:]:
        curves.setdefault(curve_of(run), []).append(run)
    svg = Svg(_WIDTH, _BOTTOM + 56, f"{section.title}: success against megabytes of weights, one curve per method")
    x = _bytes_scale([points[run.name].megabytes for run, _ in have[1:]])
    y = Scale(0.0, 100.0, _BOTTOM, _TOP)
    svg.y_axis(y, _LEFT, _RIGHT, f"{section.title}: successes, %, with 95 % intervals")
    svg.x_axis(x, _BOTTOM, "megabytes of weights and scales")
    _draw_reference(svg, have[0][0].name, points[have[0][0].name], y)
    for number, (name, runs) in enumerate(curves.items()):
        _draw_curve(svg, name, number, {run.name: points[run.name] for run in runs}, x, y)
    body = str(svg.render()).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return body.replace(">", f"><style>{_STYLE}</style>", 1) + "\n"


def _point(row: Row) -> _Point:
    return _Point(row.stored / 1e6, row.result.successes, len(row.result.episodes))


def _bytes_scale(megabytes: Sequence[float]) -> Scale:
    low, high = min(megabytes, default=0.0), max(megabytes, default=1.0)
    room = 0.08 * (high - low) or 0.1 * high
    return Scale(max(0.0, low - room), high + room, _LEFT, _RIGHT)


def _draw_reference(svg: Svg, name: str, point: _Point, y: Scale) -> None:
    low, high = point.interval
    svg.rect(_LEFT, y(high), _RIGHT - _LEFT, y(low) - y(high), "band")
    svg.line(_LEFT, y(point.rate), _RIGHT, y(point.rate), "reference")
    svg.text(_RIGHT + 12, _TOP, f"- - {name} ({point.megabytes:.1f} MB), {point.successes}/{point.trials}", "tick")


def _draw_curve(svg: Svg, name: str, number: int, points: Mapping[str, _Point], x: Scale, y: Scale) -> None:
    colour = _COLOURS[number % len(_COLOURS)]
    ordered = sorted(points.items(), key=lambda item: item[1].megabytes)
    places = [(x(point.megabytes), y(point.rate)) for _, point in ordered]
    if len(places) > 1:
        line = " ".join(f"{across:.2f},{down:.2f}" for across, down in places)
        svg.add("polyline", {"points": line, "style": f"stroke: {colour}"})
    for (run, point), (across, down) in zip(ordered, places, strict=True):
        low, high = point.interval
        bar = {"x1": across, "x2": across, "y1": y(low), "y2": y(high), "cls": "interval"}
        svg.add("line", {**bar, "style": f"stroke: {colour}"})
        tip = f"{run}: {point.successes}/{point.trials}, {point.megabytes:.2f} MB"
        svg.add("circle", {"cx": across, "cy": down, "r": 4.5, "style": f"fill: {colour}"}, tip=tip)
    row = _TOP + 20 * (number + 1)
    svg.add("circle", {"cx": _RIGHT + 20, "cy": row - 4, "r": 4.5, "style": f"fill: {colour}"})
    svg.text(_RIGHT + 32, row, name, "tick")
