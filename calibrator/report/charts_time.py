"""When in the task low precision does damage: the paper's Fig. 3."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from calibrator.report.numbers import significant
from calibrator.report.svg import Scale, Svg, linear_scale
from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.scores import phase_scores
from calibrator.sensitivity.table import UnitScores
from vla_policy.core.formats import Choice


@dataclass(frozen=True)
class PhaseBand:
    """One boundary's loss over the task: per phase the mean over states, and their standard deviation; NaN if empty."""

    boundary: str
    mean: np.ndarray
    deviation: np.ndarray


def phase_bands(losses: Mapping[str, np.ndarray], row: int, bins: int) -> list[PhaseBand]:
    """Boundary losses averaged over layers, by phase. row: index of the choice in `losses['loss']`."""
    per_state = losses["loss"][:, row].astype(np.float64).mean(0)
    phases = losses["phase"]
    bands = []
    for index, boundary in enumerate(BOUNDARIES):
        mean = phase_scores(per_state[:, index], phases, bins)
        spread = phase_scores((per_state[:, index] - mean[phases]) ** 2, phases, bins) ** 0.5
        bands.append(PhaseBand(boundary, mean, spread))
    return bands


def band_chart(bands: Sequence[PhaseBand], counts: Sequence[int], label: str) -> Markup:
    """Loss at each boundary over progress; the band is one standard deviation between the states of a phase."""
    svg = Svg(530, 420, f"Loss at each boundary over the task, {label}")
    left, right, top, bottom = 64, 518, 34, 340
    bins = len(counts)
    x = Scale(0.0, 1.0, left, right)
    tops = np.concatenate([band.mean + band.deviation for band in bands])
    y = linear_scale(tops[np.isfinite(tops)].tolist(), bottom, top)
    svg.y_axis(y, left, right, f"evidence loss, mean over layers, {label}")
    svg.x_axis(x, bottom, "progress through the task", 5)
    places = [(index + 0.5) / bins for index in range(bins)]
    for band in bands:
        seen = [index for index in range(bins) if np.isfinite(band.mean[index])]
        upper = [(x(places[i]), y(band.mean[i] + band.deviation[i])) for i in seen]
        lower = [(x(places[i]), y(max(0.0, band.mean[i] - band.deviation[i]))) for i in seen]
        svg.polygon([*upper, *reversed(lower)], f"band s-{band.boundary}")
        svg.polyline([(x(places[i]), y(band.mean[i])) for i in seen], f"curve c-{band.boundary}")
        for i in seen:
            tip = (
                f"{band.boundary} boundary, phase {i + 1} of {bins}\nloss  {significant(band.mean[i])} "
                f"± {significant(band.deviation[i])}\n{counts[i]} states"
            )
            svg.circle(x(places[i]), y(band.mean[i]), 3.5, f"mark s-{band.boundary}", tip)
    return svg.render()


def known_phase_scores(losses: np.ndarray, phases: np.ndarray, bins: int) -> np.ndarray:
    """Omega_q of Eq. (12) over the states that were evaluated (`losses` [layers, N] not NaN); NaN where none was."""
    result = np.full((len(losses), bins), np.nan)
    for line, values in enumerate(losses):
        known = np.isfinite(values)
        result[line] = phase_scores(values[known], phases[known], bins)
    return result


def heat_chart(
    units: Sequence[UnitScores],
    losses: Mapping[str, np.ndarray],
    row: int,
    bins: int,
    choice: Choice,
    label: str,
    count: int = 20,
) -> Markup:
    """Omega_q of Eq. (12) for the `count` layers of largest Omega; a dot marks a row's maximum, its Omega_tau."""
    order = sorted(range(len(units)), key=lambda index: -units[index].omega[choice])[:count]
    scores = known_phase_scores(losses["soft_bottleneck"][order, row].astype(np.float64), losses["phase"], bins)
    left, right, top, pitch = 236, 518, 34, 15.3
    svg = Svg(530, 420, f"Sensitivity of the {len(order)} most fragile layers over the task, {label}")
    cell = (right - left) / bins
    peak = max(scores[np.isfinite(scores)].tolist(), default=0.0) or 1.0
    svg.text(left, top - 12, f"Ω per phase, {label}", "axis")
    for line, index in enumerate(order):
        y = top + line * pitch
        svg.text(left - 8, y + 11, units[index].label, "tick", "end", units[index].name)
        if not np.isfinite(scores[line]).any():
            svg.text((left + right) / 2, y + 11, "not evaluated", "tick", "middle")
            continue
        worst = int(np.nanargmax(scores[line]))
        for phase in range(bins):
            value = scores[line, phase]
            if not np.isfinite(value):
                svg.rect(
                    left + phase * cell,
                    y,
                    cell - 1.5,
                    pitch - 1.5,
                    "empty",
                    f"{units[index].name}\nno state of phase {phase + 1} was evaluated",
                )
                continue
            tip = f"{units[index].name}\nphase {phase + 1} of {bins}  Ω {significant(value)}"
            x, opacity = left + phase * cell, 0.04 + 0.96 * float(value / peak) ** 0.5
            svg.rect(x, y, cell - 1.5, pitch - 1.5, "heat", tip, fill_opacity=round(opacity, 3))
            if phase == worst:
                svg.circle(x + cell / 2 - 0.75, y + pitch / 2 - 0.75, 2.4, "worst")
    svg.x_axis(Scale(0.0, 1.0, left, right), top + len(order) * pitch + 2, "progress through the task", 5)
    return svg.render()
