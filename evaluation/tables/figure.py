"""A section's finished runs as a drawing: curves of the methods that have several sizes, and below them every run.

It stands alone, on a background of its own, light or dark as the reader's system asks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from calibrator.report.svg import Scale, Svg
from evaluation.statistics import wilson_interval
from evaluation.tables.config import PlannedRun, Section
from evaluation.tables.curves import Curve, curves_of, nominal_bits
from evaluation.tables.markdown import Row

_LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 56, 72, 560, 320
_ROW, _LETTER = 18, 7.4
"""Units: height of a line, and no letter of a usual sans serif at 12 units is wider on average."""
_APART = 5.0
"""Curves are moved sideways by so much against each other, so that intervals at one size can be told apart."""

_LIGHT = ("#0072b2", "#c85200", "#00805a", "#b0457b", "#6f5cc4", "#8a6d00", "#1b86ae", "#707070")
_DARK = ("#5ab4f0", "#ff9a52", "#3fd0a0", "#f08cc0", "#b0a2ff", "#d9b93b", "#8fdcf5", "#b5b5b5")
"""Told apart by most people who confuse red and green; marks change with another period, so that 40 methods differ."""
_MARKS: tuple[tuple[tuple[float, float], ...], ...] = (
    (),  # a circle
    ((-4, -4), (4, -4), (4, 4), (-4, 4)),
    ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
    ((-5, 4), (0, -5), (5, 4)),
    ((-5, -4), (0, 5), (5, -4)),
)


def _theme(ink: str, paper: str, grid: str, colours: Sequence[str]) -> str:
    rules = [f"text {{ fill: {ink} }} .paper {{ fill: {paper} }} .grid {{ stroke: {grid} }}"]
    rules += [f".base, .reference, .ink {{ stroke: {ink} }} .band, .ink {{ fill: {ink} }}"]
    rules += [f".c{number} {{ stroke: {colour}; fill: {colour} }}" for number, colour in enumerate(colours)]
    return " ".join(rules)


_STYLE = f"""
text {{ font: 12px "Helvetica Neue", Arial, sans-serif }} .axis {{ font-weight: bold }} .band {{ opacity: 0.1 }}
.reference {{ stroke-dasharray: 5 4 }} .curve, .interval, .hollow {{ stroke-width: 1.6 }}
{_theme("#222", "#fff", "#ddd", _LIGHT)}
@media (prefers-color-scheme: dark) {{ {_theme("#ddd", "#15181d", "#39404a", _DARK)} }}
.curve.curve, .hollow.hollow {{ fill: none }}
"""


@dataclass(frozen=True)
class _Point:
    """A finished run. rate, low, high: per cent of successes, with the limits of its interval."""

    name: str
    megabytes: float
    successes: int
    trials: int

    @property
    def rate(self) -> float:
        return 100 * self.successes / self.trials

    @property
    def low(self) -> float:
        return 100 * wilson_interval(self.successes, self.trials).low

    @property
    def high(self) -> float:
        return 100 * wilson_interval(self.successes, self.trials).high

    @property
    def tip(self) -> str:
        return f"{self.name}: {self.successes}/{self.trials}, {self.megabytes:.2f} MB"


@dataclass(frozen=True)
class _Hand:
    """Draws what belongs to one method, in its colour and with its mark. number: its place, None for the reference."""

    svg: Svg
    number: int | None

    @property
    def colour(self) -> str:
        return "ink" if self.number is None else f"c{self.number % len(_LIGHT)}"

    def mark(self, x: float, y: float, tip: str = "", cls: str = "") -> None:
        """cls: besides the colour, e.g. `hollow`."""
        corners = _MARKS[(self.number or 0) % len(_MARKS)]
        title = Markup("<title>{}</title>").format(tip) if tip else ""
        if corners:
            points = " ".join(f"{x + across:.2f},{y + down:.2f}" for across, down in corners)
            self.svg.add("polygon", {"points": points, "cls": f"{self.colour} {cls}".strip()}, title)
        else:
            self.svg.add("circle", {"cx": x, "cy": y, "r": 4.5, "cls": f"{self.colour} {cls}".strip()}, title)

    def line(self, places: Sequence[tuple[float, float]]) -> None:
        self.svg.polyline(places, f"{self.colour} curve")

    def interval(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.svg.line(x1, y1, x2, y2, f"{self.colour} interval")


def draw(section: Section, rows: Mapping[str, Row]) -> str:
    """A standalone SVG of the runs that `rows` (by `section-run`) holds, with 95 % Wilson intervals.

    Above, methods with several sizes over real bytes; of runs that differ in their calibration states alone the first
    is on the curve, the others are hollow marks beside it. Below, every run, those of equal bits together. The first
    run of the section is the reference: a dashed line with its interval.
    """
    points = {
        run.name: _point(run.name, rows[slug])
        for run in section.runs
        if (slug := f"{section.name}-{run.name}") in rows
    }
    finished = [run for run in section.runs if run.name in points]
    reference, others = points[finished[0].name], finished[1:]
    curves = curves_of(others)
    shown = [curve for curve in curves if len(curve.sizes) > 1]
    below = _TOP + max(_PLOT_HEIGHT + 72, _ROW * (len(shown) + 3)) if shown else 40
    groups = len({nominal_bits(run) for run in others})
    names = max(map(len, points)) * _LETTER + 24
    legend = max((len(curve.label) for curve in shown), default=0) * _LETTER + 44
    width = round(max(_LEFT + _PLOT_WIDTH + 24 + legend, names + _PLOT_WIDTH + 24 + 20 * _LETTER))
    svg = Svg(width, round(below + _ROW * (len(others) + groups + 5) + 24), f"{section.title}: successes of every run")
    svg.rect(0, 0, svg.width, svg.height, "paper")
    svg.text(16, 24, section.title, "axis")
    if shown:
        _draw_curves(svg, shown, points, reference)
    _draw_rows(svg, curves, points, reference, _percent(points.values(), names, names + _PLOT_WIDTH), below)
    body = str(svg.render()).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return body.replace(">", f"><style>{_STYLE}</style>", 1) + "\n"


def _point(name: str, row: Row) -> _Point:
    return _Point(name, row.size.stored_bytes / 1e6, row.result.successes, len(row.result.episodes))


def _percent(points: Iterable[_Point], start: float, end: float) -> Scale:
    """From the tens below the lowest interval up to 100 %."""
    return Scale(min(point.low for point in points) // 10 * 10, 100.0, start, end)


def _draw_curves(svg: Svg, curves: Sequence[Curve], points: Mapping[str, _Point], reference: _Point) -> None:
    right, bottom = _LEFT + _PLOT_WIDTH, _TOP + _PLOT_HEIGHT
    drawn = [points[run.name] for curve in curves for size in curve.sizes for run in size]
    margin = _APART * (len(curves) + 2) / 2
    megabytes = [point.megabytes for point in drawn]
    x = Scale(min(megabytes), max(megabytes), _LEFT + margin, right - margin, log=True)
    y = _percent([*drawn, reference], bottom, _TOP)
    svg.y_axis(y, _LEFT, right, "successes, %, with 95 % intervals, of methods at several sizes")
    svg.x_axis(x, bottom, "megabytes of codes and scales; methods of one size stand beside each other")
    svg.rect(_LEFT, y(reference.high), _PLOT_WIDTH, y(reference.low) - y(reference.high), "band")
    svg.line(_LEFT, y(reference.rate), right, y(reference.rate), "reference")
    for number, curve in enumerate(curves):
        hand, aside = _Hand(svg, number), _APART * (number - (len(curves) - 1) / 2)
        placed = [[(x(points[run.name].megabytes) + aside, points[run.name]) for run in size] for size in curve.sizes]
        hand.line([(size[0][0], y(size[0][1].rate)) for size in placed])
        for (across, point), *again in placed:
            hand.interval(across, y(point.low), across, y(point.high))
            hand.mark(across, y(point.rate), point.tip)
            for place, other in again:
                hand.mark(place, y(other.rate), other.tip, "hollow")
        line = _TOP + _ROW * (number + 1)
        hand.line([(right + 16, line - 4), (right + 40, line - 4)])
        hand.mark(right + 28, line - 4)
        svg.text(right + 48, line, curve.label, "key")
    svg.line(right + 16, _TOP - 4, right + 40, _TOP - 4, "reference")
    svg.text(right + 48, _TOP, reference.name, "key")


def _draw_rows(
    svg: Svg,
    curves: Sequence[Curve],
    points: Mapping[str, _Point],
    reference: _Point,
    x: Scale,
    top: float,
) -> None:
    """Every run on a line of its own, runs of equal bits below each other, few bits first, the reference last."""
    svg.text(x.start, top, "successes, %, of every run", "axis")
    numbers = {run.name: number for number, curve in enumerate(curves) for size in curve.sizes for run in size}
    of_bits: dict[float, list[PlannedRun]] = {}
    for run in sorted((run for curve in curves for size in curve.sizes for run in size), key=nominal_bits):
        of_bits.setdefault(nominal_bits(run), []).append(run)
    bottom = top + 20 + _ROW * (len(numbers) + len(of_bits) + 2)
    svg.rect(x(reference.low), top + 12, x(reference.high) - x(reference.low), bottom - top - 12, "band")
    for value in x.ticks():
        svg.line(x(value), top + 12, x(value), bottom, "grid")
    svg.x_axis(x, bottom, "%")
    svg.line(x(reference.rate), top + 12, x(reference.rate), bottom, "reference")
    line = top + 12
    for bits, runs in of_bits.items():
        line += _ROW
        svg.text(16, line, f"{bits:g} bits", "axis")
        for run in runs:
            line += _ROW
            _draw_row(svg, _Hand(svg, numbers[run.name]), points[run.name], x, line)
    line += _ROW
    svg.text(16, line, "reference", "axis")
    _draw_row(svg, _Hand(svg, None), reference, x, line + _ROW)


def _draw_row(svg: Svg, hand: _Hand, point: _Point, x: Scale, line: float) -> None:
    svg.text(24, line, point.name, "key")
    hand.interval(x(point.low), line - 4, x(point.high), line - 4)
    hand.mark(x(point.rate), line - 4, point.tip)
    svg.text(x.end + 16, line, f"{point.successes}/{point.trials}, {point.megabytes:.2f} MB", "key")
