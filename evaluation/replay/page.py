"""The replay's HTML page: one self-contained file."""

import base64
import io
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

import calibrator.report
from calibrator.report.numbers import significant
from calibrator.report.svg import Scale, Svg, linear_scale
from evaluation.replay.compare import DimensionError, WorstFrame
from evaluation.replay.perform import Outcome
from evaluation.replay.run import Answers

_FOLDER = Path(__file__).parent / "templates"
_STYLE = Path(calibrator.report.__file__).parent / "templates"


@dataclass(frozen=True)
class WorstView:
    """One of the worst frames with a picture per camera and both actions."""

    frame: WorstFrame
    pictures: tuple[str, ...]
    instruction: str
    values: tuple[tuple[str, float, float], ...]


def picture(image: np.ndarray) -> str:
    """A data URI of a uint8 RGB image."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def render(outcome: Outcome, worst: tuple[WorstView, ...]) -> str:
    """The page as one HTML document."""
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.filters["number"] = significant
    candidate, reference, comparison = outcome.candidate, outcome.reference, outcome.comparison
    return environment.get_template("replay.html").render(
        sources=outcome.sources,
        reference=reference,
        candidate=candidate,
        comparison=comparison,
        charts=[_progress_chart(item) for item in comparison.dimensions] if comparison else [],
        worst=worst,
        checks=outcome.checks,
        latency=[_latency_row(item) for item in (reference, candidate) if item is not None],
        css=Markup((_STYLE / "style.css").read_text(encoding="utf-8")),
        script=Markup((_STYLE / "page.js").read_text(encoding="utf-8")),
        version=version("vla-deploy"),
    )


def _latency_row(answers: Answers) -> tuple[str, float, float, float]:
    p50, p99, most = np.percentile(answers.latency_ms, (50, 99, 100)).tolist()
    return answers.name, p50, p99, most


def _progress_chart(dimension: DimensionError) -> Markup:
    """Mean absolute error of one dimension over progress."""
    svg = Svg(520, 220, f"Error of {dimension.name} over progress")
    left, right, top, bottom = 70, 506, 30, 166
    bins = len(dimension.over_progress)
    x = Scale(0.0, 1.0, left, right)
    y = linear_scale((value for value in dimension.over_progress if not math.isnan(value)), bottom, top)
    svg.y_axis(y, left, right, f"{dimension.name}: mean |error|, {dimension.unit}", 3)
    svg.x_axis(x, bottom, "progress through the episode", 5)
    points = [
        (x((index + 0.5) / bins), y(value), value, index)
        for index, value in enumerate(dimension.over_progress)
        if not math.isnan(value)
    ]
    svg.polyline([point[:2] for point in points], "curve c-accent")
    for across, up, value, index in points:
        tip = f"{dimension.name}, tenth {index + 1} of {bins}\n{significant(value)} {dimension.unit}"
        svg.circle(across, up, 3.5, "mark s-accent", tip)
    return svg.render()
