"""What the node served: action error against full precision, response times, drops."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from calibrator.report.artefacts import ReferenceDecisions, ServedRun
from calibrator.report.numbers import significant
from calibrator.report.svg import Scale, Svg, linear_scale
from vla_policy.core.contract import Contract


@dataclass(frozen=True)
class ActionError:
    """Served minus full-precision actions on the frames that both decided.

    time_s: float64 [N], from the first frame. error: float64 [N, K] in the action's own units. names: K names with
    units. equal_decisions: share of frames with all tokens equal.
    """

    time_s: np.ndarray
    error: np.ndarray
    names: tuple[str, ...]
    equal_decisions: float


def action_error(served: ServedRun, reference: ReferenceDecisions, contract: Contract | None) -> ActionError | None:
    """None where no frame was decided by both."""
    pairs = [(d, reference.decisions[d.stamp_ns]) for d in served.decisions if d.stamp_ns in reference.decisions]
    if not pairs:
        return None
    stamps = np.asarray([mine.stamp_ns for mine, _ in pairs], np.int64)
    error = np.asarray([np.subtract(mine.action, other.action) for mine, other in pairs])
    return ActionError(
        (stamps - stamps[0]) / 1e9,
        error,
        _names(error.shape[1], contract),
        float(np.mean([mine.tokens == other.tokens for mine, other in pairs])),
    )


def _names(count: int, contract: Contract | None) -> tuple[str, ...]:
    names = [dimension.name for dimension in contract.action.dimensions] if contract and contract.action else []
    if names and count % len(names) == 0:
        steps = count // len(names)
        return tuple(names[i % len(names)] + (f" [{i // len(names)}]" if steps > 1 else "") for i in range(count))
    return tuple(f"dimension {index}" for index in range(count))


def error_strips(errors: ActionError) -> Markup:
    """One strip per action dimension over time, each with its own scale: served minus full precision."""
    left, right, pitch, height = 120, 900, 54, 40
    count = errors.error.shape[1]
    svg = Svg(1080, 50 + pitch * count, "Action error over time")
    x = Scale(0.0, float(errors.time_s[-1]) or 1.0, left, right)
    for index, name in enumerate(errors.names):
        values = errors.error[:, index]
        largest, middle = float(np.abs(values).max()), 10 + index * pitch + height / 2
        y = Scale(-(largest or 1.0), largest or 1.0, middle + height / 2, middle - height / 2)
        svg.rect(left, middle - height / 2, right - left, height, "strip")
        svg.line(left, middle, right, middle, "base")
        for time_s, value in zip(errors.time_s, values, strict=True):
            svg.line(x(float(time_s)), middle, x(float(time_s)), y(float(value)), "spike")
        for time_s, value in zip(errors.time_s, values, strict=True):
            tip = f"{name} at {significant(float(time_s))} s\nserved − full precision  {significant(float(value))}"
            svg.rect(x(float(time_s)) - 3, middle - height / 2, 6, height, "hit", tip)
        svg.text(left - 10, middle + 4, name, "label", "end")
        svg.text(right + 12, middle - 3, f"largest  {significant(largest)}", "tick")
        svg.text(right + 12, middle + 13, f"RMS  {significant(float(np.sqrt(np.mean(values**2))))}", "tick")
    svg.x_axis(x, 10 + pitch * count, "seconds since the first frame", 8)
    return svg.render()


@dataclass(frozen=True)
class Times:
    """One kind of time over all messages."""

    title: str
    count: int
    median_ms: float
    p99_ms: float
    chart: Markup


def times(title: str, values_ms: Sequence[float]) -> Times:
    """Median, 99th percentile and histogram of `values_ms`."""
    median_ms, p99_ms = np.quantile(values_ms, [0.5, 0.99]).tolist()
    return Times(title, len(values_ms), median_ms, p99_ms, latency_histogram(values_ms, title))


def latency_histogram(values_ms: Sequence[float], title: str) -> Markup:
    """How often each time occurred; lines at the median and the 99th percentile."""
    left, right, top, bottom = 64, 518, 34, 180
    svg = Svg(530, 232, title)
    x = Scale(0.0, max(values_ms) * 1.02, left, right)
    counts, edges = np.histogram(values_ms, bins=40, range=(0.0, x.high))
    y = linear_scale([float(counts.max())], bottom, top)
    svg.y_axis(y, left, right, "messages", 4)
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        if count:
            tip = f"{significant(float(low))} to {significant(float(high))} ms\n{count} messages"
            start, head = x(float(low)), y(float(count))
            svg.rect(start, head, x(float(high)) - start - 1, bottom - head, "s-accent", tip)
    for share, label in ((0.5, "p50"), (0.99, "p99")):
        place = x(float(np.quantile(values_ms, share)))
        svg.line(place, top, place, bottom, "mean")
        svg.text(place, top - 4, label, "axis strong", "middle")
    svg.x_axis(x, bottom, f"{title}, ms", 6)
    return svg.render()
