"""Bytes and latency of the mixed engine beside the 16-bit one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from calibrator.report.numbers import byte_unit, in_bytes, significant
from calibrator.report.svg import Scale, Svg
from vla_policy.core.bench import Bench
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest, UnitRecord


@dataclass(frozen=True)
class FormatCount:
    """How many layers were planned in a format and how many of these really have it."""

    planned: str
    layers: int
    realised: int
    weights: int
    code_bytes: int
    scale_bytes: int
    arithmetic: str


def as_planned(unit: UnitRecord) -> bool:
    """Whether a layer has its planned format; a group as long as the layer's inputs is one scale per output channel."""
    planned = Format.parse(unit.planned)
    if planned.group_size is not None and planned.group_size >= unit.inputs:
        planned = replace(planned, group_size=None)
    return unit.realised in (unit.planned, str(planned))


def format_counts(engine: Manifest) -> list[FormatCount]:
    """Planned against realised formats, most weights first."""
    rows = []
    for planned in dict.fromkeys(unit.planned for unit in engine.units):
        units = [unit for unit in engine.units if unit.planned == planned]
        rows.append(
            FormatCount(
                planned=planned,
                layers=len(units),
                realised=sum(as_planned(unit) for unit in units),
                weights=sum(unit.weights for unit in units),
                code_bytes=sum(unit.code_bytes for unit in units),
                scale_bytes=sum(unit.scale_bytes for unit in units),
                arithmetic="; ".join(dict.fromkeys(unit.arithmetic for unit in units)),
            )
        )
    return sorted(rows, key=lambda row: -row.weights)


def bytes_chart(engines: Sequence[tuple[str, Manifest]]) -> Markup:
    """Codes, scales and everything else of each engine on one scale."""
    left, right, pitch = 120, 940, 40
    svg = Svg(1080, 46 + pitch * len(engines), "Bytes of the engines")
    largest = max(engine.totals()["engine_bytes"] for _, engine in engines)
    unit_bytes, name = byte_unit(largest)
    x = Scale(0.0, largest / unit_bytes, left, right)
    bottom = 10 + pitch * len(engines)
    for index, (label, engine) in enumerate(engines):
        totals, y, start = engine.totals(), 10 + index * pitch, 0.0
        rest = totals["engine_bytes"] - totals["code_bytes"] - totals["scale_bytes"]
        svg.text(left - 10, y + 18, label, "label", "end")
        parts = (("weights", totals["code_bytes"]), ("scales", totals["scale_bytes"]), ("everything else", rest))
        for number, (what, count) in enumerate(parts):
            end = start + count / unit_bytes
            svg.rect(x(start), y, x(end) - x(start), 26, f"part{number}", f"{label}: {what}\n{count:,} bytes")
            start = end
        svg.text(x(start) + 10, y + 18, in_bytes(totals["engine_bytes"], 4), "label")
    svg.x_axis(x, bottom, name, 6)
    return svg.render()


def latency_chart(bench: Bench) -> Markup:
    """Median of every stage for all engines; the thin line reaches the 99th percentile."""
    stages = {stage: "whole action" if stage == "action" else stage for stage in bench.engine.stages}
    sides = [("mixed", bench.engine, "s-accent")]
    sides += [(f"16-bit, {figures.backend}", figures, "s-muted") for figures in bench.references]
    left, right, pitch = 120, 900, 14 + 22 * len(sides)
    svg = Svg(1080, 46 + pitch * len(stages), "Latency of all engines by stage")
    laps_of = [figures.stages[stage] for _, figures, _ in sides for stage in stages]
    # One stalled measurement must not flatten every bar; a tail beyond the axis is given as a number.
    longest = min(max(laps.p99_ms for laps in laps_of), 2 * max(laps.median_ms for laps in laps_of))
    x = Scale(0.0, longest * 1.02, left, right)
    for index, stage in enumerate(stages):
        y = 10 + index * pitch
        svg.text(left - 10, y + 4 + 11 * len(sides), stages[stage], "label", "end")
        for number, (label, figures, colour) in enumerate(sides):
            laps, line = figures.stages[stage], y + number * 22
            tip = (
                f"{label}, {stages[stage]}\nmedian {significant(laps.median_ms)} ms\n"
                f"p90 {significant(laps.p90_ms)} ms\np99 {significant(laps.p99_ms)} ms\n{laps.count} measurements"
            )
            svg.rect(left, line, x(laps.median_ms) - left, 18, colour, tip)
            end = x(min(laps.p99_ms, x.high))
            svg.line(x(laps.median_ms), line + 9, end, line + 9, "whisker")
            if laps.p99_ms <= x.high:
                svg.line(end, line + 4, end, line + 14, "whisker")
            text = f"{significant(laps.median_ms)} ms, p99 {significant(laps.p99_ms)}"
            svg.text(end + 8, line + 13, text + (f", {figures.backend}" if len(sides) > 2 else ""), "tick")
    svg.x_axis(x, 10 + pitch * len(stages), "milliseconds", 6)
    return svg.render()
