"""Hand-made sensitivity tables."""

import numpy as np
from choices import CHOICES

from calibrator.sensitivity.table import Sensitivity, UnitScores
from vla_policy.core.formats import FULL, Choice

BY_BITS = {choice.format.weight_bits: choice for choice in (*CHOICES, FULL)}


def unit(
    name: str, omega: dict[int, float], inputs: int = 64, outputs: int = 10, group: str | None = None
) -> UnitScores:
    """A layer whose temporal score is twice its score and whose action error is a tenth. omega: by weight bits."""
    return scored(name, {BY_BITS[bits]: value for bits, value in (omega | {16: 0.0}).items()}, inputs, outputs, group)


def scored(
    name: str, omega: dict[Choice, float], inputs: int = 64, outputs: int = 10, group: str | None = None
) -> UnitScores:
    """As `unit`, by choice, full precision included."""
    return UnitScores(
        name=name,
        label=name,
        stage="language",
        track="language",
        segment="language",
        kind="linear",
        group=group or name,
        inputs=inputs,
        outputs=outputs,
        macs=inputs * outputs * 7,
        omega=omega,
        omega_tau={choice: 2 * value for choice, value in omega.items()},
        action_mse={choice: value / 10 for choice, value in omega.items()},
        action_proxy={choice: value / 20 for choice, value in omega.items()},
        likelihood_drop={choice: value / 30 for choice, value in omega.items()},
        boundary_loss={},
    )


def table(units: list[UnitScores]) -> Sensitivity:
    meta = {
        "policy": {"id": "hand", "sha256": "p" * 64},
        "calibration": {"sha256": "c" * 64},
        "random_spread": None,
        "noise_floor": {"omega": 1e-6, "samples": [0]},
    }
    choices = tuple(sorted(units[0].omega, key=lambda choice: choice.precision))
    return Sensitivity(tuple(units), choices, 1000, meta, "sensitivity.json", "s" * 64)


def random_table(count: int, seed: int, fused: bool = False) -> Sensitivity:
    """Scores that fall with bits on average but, as on few samples, not always."""
    generator = np.random.default_rng(seed)
    units = []
    for index in range(count):
        scores = {bits: float(generator.exponential() * factor) for bits, factor in ((2, 1.0), (4, 0.3), (8, 0.05))}
        inputs, outputs = (int(side) for side in generator.integers(5, 80, 2))
        group = f"group_{index // 2}" if fused else None
        units.append(unit(f"layer_{index}", scores, inputs, outputs, group))
    return table(units)
