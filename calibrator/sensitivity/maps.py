"""Evidence over the camera image: where a decision's support sits, and where low precision moves it (Fig. 1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibrator.sensitivity.evidence import jensen_shannon, mass_distortion, profile
from calibrator.sensitivity.passes import signals
from calibrator.sensitivity.scores import ScoreSettings
from calibrator.sensitivity.sweep import Sweep
from calibrator.sensitivity.table import UnitScores
from vla_policy.core.formats import FULL, Choice

_BOUNDARY = "vision"


def pick_units(units: Sequence[UnitScores], choice: Choice) -> list[str]:
    """The vision layer and the layer of the rest that lose most evidence in `choice`."""
    vision = [unit for unit in units if unit.stage == "vision"]
    rest = [unit for unit in units if unit.stage != "vision"]
    return [max(pool, key=lambda unit: unit.omega[choice]).name for pool in (vision, rest) if pool]


def pick_samples(progress: np.ndarray, count: int) -> list[int]:
    """`count` different states whose progress is nearest to evenly spaced instants."""
    chosen: list[int] = []
    for target in (np.arange(count) + 0.5) / count:
        order = np.argsort(np.abs(progress - target), kind="stable")
        chosen.append(next(int(index) for index in order if int(index) not in chosen))
    return chosen


@dataclass(frozen=True)
class MapsTask:
    """The maps of some layers on some states, as `evidence_maps` gives them."""

    units: tuple[str, ...]
    samples: tuple[int, ...]
    settings: ScoreSettings

    def __str__(self) -> str:
        return "evidence over the image"

    def __call__(self, sweep: Sweep) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return evidence_maps(sweep, self.units, self.samples, self.settings)


def evidence_maps(
    sweep: Sweep, units: Sequence[str], samples: Sequence[int], settings: ScoreSettings
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """E of Eq. (4) at the vision boundary, summed over channels, and its loss of Eq. (8).

    Returns tensors `evidence` float32 [units, states, 1 + choices, patches] (full precision first) and `loss` float32
    [units, states, 1 + choices], and a description with the names of the axes.
    """
    choices = sweep.settings.choices[::-1]
    height, width = sweep.chain.image_grid
    evidence = np.zeros((len(units), len(samples), 1 + len(choices), height * width), np.float32)
    loss = np.zeros(evidence.shape[:3], np.float32)
    for column, sample in enumerate(samples):
        trunk, full = sweep.full_precision((sample,))
        before = sweep.evidence(full, _BOUNDARY)
        reference = profile(before, sweep.settings.epsilon)
        for row, unit in enumerate(units):
            evidence[row, column, 0] = before.sum(-1)[0].cpu()
            for depth, choice in enumerate(choices, 1):
                with sweep.changed(unit, choice):
                    now = sweep.evidence(signals(trunk, sweep.units[unit].segment), _BOUNDARY)
                changed = profile(now, sweep.settings.epsilon)
                mass = mass_distortion(reference, changed, sweep.settings.epsilon)
                attribution = jensen_shannon(reference.attribution, changed.attribution)
                evidence[row, column, depth] = now.sum(-1)[0].cpu()
                loss[row, column, depth] = float(mass + settings.attribution_weight * attribution)
    shown = [str(choice) for choice in (FULL, *choices)]
    axes = {"units": list(units), "samples": list(samples), "choices": shown, "grid": [height, width]}
    return {"evidence": evidence, "loss": loss}, {"boundary": _BOUNDARY, **axes}
