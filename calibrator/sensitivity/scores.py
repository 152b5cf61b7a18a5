"""From losses per sample to the scores that allocation minimises: Mix-QVLA Eqs. (8) to (13)."""

from dataclasses import dataclass

import numpy as np

from vla_policy.core.errors import DataError
from vla_policy.core.formats import Choice


@dataclass(frozen=True)
class ScoreSettings:
    """kappa: temperature of Eq. (9). attribution_weight: lambda of Eq. (8). bins: number of phases Q of Eq. (12)."""

    kappa: float = 0.1
    attribution_weight: float = 1.0
    bins: int = 5

    def __post_init__(self) -> None:
        if not self.kappa > 0 or not self.attribution_weight >= 0 or self.bins < 1:
            raise DataError(
                f"kappa {self.kappa}, lambda {self.attribution_weight}, bins {self.bins}: "
                "expected kappa > 0, lambda >= 0 and a bin"
            )


def evidence_loss(mass: np.ndarray, attribution: np.ndarray, attribution_weight: float) -> np.ndarray:
    """l^ev of Eq. (8): Delta^mass + lambda Delta^attr, any shape."""
    return mass + attribution_weight * attribution


def soft_bottleneck(losses: np.ndarray, kappa: float) -> np.ndarray:
    """L^SB of Eq. (9) over the last axis (boundaries): kappa ln(mean(exp(l / kappa))), by log-sum-exp.

    Between the mean and the maximum of the losses; the maximum as kappa goes to 0.
    """
    peak = losses.max(-1, keepdims=True)
    return (peak + kappa * np.log(np.exp((losses - peak) / kappa).mean(-1, keepdims=True)))[..., 0]


def phase_of(progress: np.ndarray, bins: int) -> np.ndarray:
    """int64 [N]: the bin of [0, 1] that holds each progress value; 1.0 belongs to the last."""
    return np.minimum((np.asarray(progress) * bins).astype(np.int64), bins - 1)


def phase_scores(losses: np.ndarray, phases: np.ndarray, bins: int) -> np.ndarray:
    """Omega_q of Eq. (12): [..., bins], the mean of `losses` [..., N] per phase; NaN where a phase has no sample."""
    result = np.full((*losses.shape[:-1], bins), np.nan)
    for phase in np.unique(phases):
        result[..., phase] = losses[..., phases == phase].mean(-1)
    return result


def temporal_score(losses: np.ndarray, phases: np.ndarray) -> np.ndarray:
    """Omega_tau of Eq. (13): the largest phase mean of `losses` [..., N] over the phases that have samples."""
    return np.max([losses[..., phases == phase].mean(-1) for phase in np.unique(phases)], axis=0)


def check_finite(
    losses: np.ndarray,
    unit: str,
    choices: tuple[Choice, ...],
    samples: tuple[int, ...],
    boundaries: tuple[str, ...],
) -> None:
    """Raises DataError naming unit, choice, sample and boundary of the first of `losses` [choices, N, boundaries]."""
    bad = np.argwhere(~np.isfinite(losses))
    if len(bad):
        row, sample, boundary = bad[0]
        raise DataError(
            f"{unit} in {choices[row]}: evidence of sample {samples[sample]} at boundary "
            f"{boundaries[boundary]!r} is not finite ({len(bad)} such values); if the policy overflows, "
            f"use --dtype float32"
        )
