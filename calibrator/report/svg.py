"""Small drawings: elements, scales and axes. Colours are classes of the page's style sheet, so both themes work."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from calibrator.report.numbers import significant


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to the pixels [start, end]. On a logarithmic scale smaller values are drawn at `low`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round values within the scale."""
        if self.log:
            exponents = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            step = max(1, math.ceil(len(exponents) / (count + 1)))
            decades = [10.0**exponent for exponent in exponents][::step]
            return decades if len(decades) > 1 else self._within_a_decade(count)
        rough = (self.high - self.low) / count or 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        step_size = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(size - rough))
        first = math.ceil(self.low / step_size - 1e-9)
        return [index * step_size for index in range(first, math.floor(self.high / step_size + 1e-9) + 1)]

    def _within_a_decade(self, count: int) -> list[float]:
        """For a scale too short for powers of ten alone: 1, 2 and 5 times them, or equal steps where few fit."""
        lowest = math.floor(math.log10(self.low))
        steps = [factor * 10.0**exponent for exponent in (lowest, lowest + 1, lowest + 2) for factor in (1, 2, 5)]
        within = [step for step in steps if self.low <= step <= self.high]
        return within if len(within) > 2 else replace(self, log=False).ticks(count)


def log_scale(values: Iterable[float], start: float, end: float, decades: float = 6.0) -> Scale:
    """A logarithmic scale over the positive `values`, at most `decades` deep, with some room at both ends."""
    positive = [value for value in values if value > 0] or [1.0]
    high = max(positive) * 1.4
    low = max(min(positive) / 1.4, high / 10**decades)
    return Scale(low, high, start, end, log=True)


def linear_scale(values: Iterable[float], start: float, end: float) -> Scale:
    """A linear scale from 0 over the `values`, with some room at the top."""
    return Scale(0.0, max([*values, 0.0]) * 1.08 or 1.0, start, end)


class Svg:
    """A drawing of `width` x `height` units that fills its column; `label` describes it to a screen reader."""

    def __init__(self, width: int, height: int, label: str) -> None:
        self.width, self.height, self._label = width, height, label
        self._parts: list[str] = []

    def add(self, tag: str, attributes: Mapping[str, object], content: str = "", tip: str = "") -> None:
        """Appends an element. Underscores in attribute names become hyphens, `cls` is the class; floats are rounded."""
        if tip:
            attributes = {**attributes, "data_tip": tip}
        shown = "".join(f' {_attribute(name)}="{escape(_short(value))}"' for name, value in attributes.items())
        self._parts.append(f"<{tag}{shown}>{escape(content)}</{tag}>" if content else f"<{tag}{shown}/>")

    def rect(self, x: float, y: float, width: float, height: float, cls: str, tip: str = "", **more: object) -> None:
        box = {"x": x, "y": y, "width": max(width, 0.0), "height": max(height, 0.0), "cls": cls}
        self.add("rect", {**box, **more}, tip=tip)

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str) -> None:
        self.add("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "cls": cls})

    def circle(self, x: float, y: float, radius: float, cls: str, tip: str = "") -> None:
        self.add("circle", {"cx": x, "cy": y, "r": radius, "cls": cls}, tip=tip)

    def text(self, x: float, y: float, content: str, cls: str, anchor: str = "start", tip: str = "") -> None:
        self.add("text", {"x": x, "y": y, "cls": cls, "text_anchor": anchor}, content, tip)

    def polyline(self, points: Sequence[tuple[float, float]], cls: str) -> None:
        self.add("polyline", {"points": _points(points), "cls": cls})

    def polygon(self, points: Sequence[tuple[float, float]], cls: str) -> None:
        self.add("polygon", {"points": _points(points), "cls": cls})

    def y_axis(self, scale: Scale, left: float, right: float, title: str, count: int = 5) -> None:
        """Grid lines with their values at the left, the title above them."""
        for value in scale.ticks(count):
            y = scale(value)
            self.line(left, y, right, y, "grid")
            self.text(left - 8, y + 4, _tick(value), "tick", "end")
        self.text(left, min(scale.start, scale.end) - 12, title, "axis")

    def x_axis(self, scale: Scale, y: float, title: str, count: int = 6) -> None:
        """Values below a base line at `y`, the title at its right end."""
        self.line(scale.start, y, scale.end, y, "base")
        for value in scale.ticks(count):
            x = scale(value)
            self.line(x, y, x, y + 4, "base")
            self.text(x, y + 18, _tick(value), "tick", "middle")
        self.text(scale.end, y + 36, title, "axis", "end")

    def render(self) -> Markup:
        body = "".join(self._parts)
        return Markup(
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self._label)}">{body}</svg>'
        )


def _attribute(name: str) -> str:
    return "class" if name == "cls" else name.replace("_", "-")


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def _tick(value: float) -> str:
    text = significant(value, 3)
    if "×" in text:
        return text.replace(".00×", "×").removeprefix("1×")
    return text.rstrip("0").rstrip(".") if "." in text else text
