"""Hand-made sensitivity tables."""

import numpy as np

from calibrator.sensitivity.table import Sensitivity, UnitScores

BITS = (2, 4, 8, 16)


def unit(
    name: str, omega: dict[int, float], inputs: int = 64, outputs: int = 10, group: str | None = None
) -> UnitScores:
    """A layer whose temporal score is twice its score and whose action error is a tenth."""
    full = omega | {16: 0.0}
    return UnitScores(
        name=name,
        stage="language",
        group=group or name,
        inputs=inputs,
        outputs=outputs,
        macs=inputs * outputs * 7,
        omega=full,
        omega_tau={bits: 2 * value for bits, value in full.items()},
        action_mse={bits: value / 10 for bits, value in full.items()},
        action_proxy={bits: value / 20 for bits, value in full.items()},
        likelihood_drop={bits: value / 30 for bits, value in full.items()},
        boundary_loss={},
    )


def table(units: list[UnitScores], scheme: str = "weight-only") -> Sensitivity:
    meta = {"policy": {"id": "hand", "sha256": "p" * 64}, "calibration": {"sha256": "c" * 64}}
    return Sensitivity(tuple(units), BITS, scheme, 32, 1000, meta, "sensitivity.json", "s" * 64)


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
