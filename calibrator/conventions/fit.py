"""How well decided actions fit recorded ones, and whether another convention fits clearly better.

Errors count in units of the recording's own spread, so that they need no statistics of the policy, whose key may be the
mistake: e_i = mean over moving dimensions of |decided - recorded| / std(recorded) for state i.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import wilcoxon

_CONSTANT = 1e-6  # of the largest spread: a dimension that hardly moves has no scale
_BETTER, _CHANCE = 0.15, 1e-3
"""Another convention is better where its error is lower by this part and Wilcoxon's signed-rank test of the states'
differences, which a few large ones do not decide, gives chance no more than this; below 10 states it never does."""
_SAME = 0.02
"""A correlation that is lower by no more is not: other statistics scale and shift actions and leave it as it is."""
_AGREEING, _FEWEST = 0.25, 8
"""A gripper that agrees in less than this part of at least so many states runs the other way."""


@dataclass(frozen=True)
class Dimension:
    """One action dimension. error: mean |decided - recorded| in its own unit; correlation: over the states, None where
    either does not vary."""

    error: float
    spread: float
    correlation: float | None
    gripper: bool


@dataclass(frozen=True)
class Fit:
    """One convention. errors: float64 [N], e_i; agreement: of the gripper's two meanings, None where the recording has
    one meaning only or there is no gripper."""

    dimensions: tuple[Dimension, ...]
    errors: np.ndarray
    agreement: float | None

    @property
    def error(self) -> float:
        return float(self.errors.mean())

    @property
    def correlation(self) -> float:
        """Mean over the moving dimensions; a dimension that the policy never changes counts 0."""
        moving = [one.correlation or 0.0 for one in self.dimensions if one.spread and not one.gripper]
        return float(np.mean(moving)) if moving else 0.0


@dataclass(frozen=True)
class Recording:
    """Recorded actions float64 [N, K]. gripper: bool [K], the dimensions with two meanings. open_above: float64 [K],
    between the two meanings of the recorded values; decided_above: likewise of the policy's."""

    actions: np.ndarray
    gripper: np.ndarray
    open_above: np.ndarray
    decided_above: np.ndarray

    @staticmethod
    def of(actions: np.ndarray, low: np.ndarray, high: np.ndarray, mask: np.ndarray) -> "Recording":
        """low, high, mask [K]: of the policy's action statistics. A gripper is what the policy does not normalise, or
        what was recorded with two values only."""
        actions = np.asarray(actions, np.float64)
        two = np.asarray([len(np.unique(column)) == 2 for column in actions.T])
        middle = (actions.min(0) + actions.max(0)) / 2
        return Recording(actions, two | ~mask, middle, (low + high) / 2)

    @property
    def spread(self) -> np.ndarray:
        """float64 [K]: standard deviations; 0 for the gripper and for what hardly moves."""
        spread = np.where(self.gripper, 0.0, self.actions.std(0))
        return np.where(spread > _CONSTANT * max(spread.max(), _CONSTANT), spread, 0.0)

    def fit(self, decided: np.ndarray, opposite: np.ndarray) -> Fit:
        """decided: float64 [N, K]; opposite: bool [N], states whose gripper was recorded in the other sense."""
        spread = self.spread
        moving = spread > 0
        apart = np.abs(decided - self.actions)
        errors = (apart[:, moving] / spread[moving]).mean(1) if moving.any() else np.zeros(len(apart))
        dimensions = tuple(
            Dimension(
                error=float(apart[:, k].mean()),
                spread=float(spread[k]),
                correlation=correlation(decided[:, k], self.actions[:, k]),
                gripper=bool(self.gripper[k]),
            )
            for k in range(decided.shape[1])
        )
        return Fit(dimensions, errors, self._agreement(decided, opposite))

    def _agreement(self, decided: np.ndarray, opposite: np.ndarray) -> float | None:
        """Over the dimensions whose two meanings were both recorded; they count equally often."""
        shares = []
        for k in np.flatnonzero(self.gripper):
            recorded = self.actions[:, k] > self.open_above[k]
            if recorded.all() or not recorded.any():
                continue
            same = (decided[:, k] > self.decided_above[k]) == (recorded ^ opposite)
            shares.append((same[recorded].mean() + same[~recorded].mean()) / 2)
        return float(np.mean(shares)) if shares else None


def correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Pearson's, None where either does not vary."""
    a, b = first - first.mean(), second - second.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else None


def clearly_better(other: Fit, now: Fit) -> bool:
    """Whether the actions under `other` are nearer to the recorded ones than under `now`, beyond chance."""
    gains = now.errors - other.errors
    if other.error >= (1 - _BETTER) * now.error or other.correlation < now.correlation - _SAME:
        return False
    return float(wilcoxon(gains, alternative="greater").pvalue) <= _CHANCE


def runs_the_other_way(agreement: float | None, states: int) -> bool:
    """Whether a gripper's agreement says that the opposite sense was meant."""
    return agreement is not None and states >= _FEWEST and agreement < _AGREEING
