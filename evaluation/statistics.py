"""Intervals and tests for success counts, in plain Python so that a reader can check them line by line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vla_policy.core.errors import DataError

# 97.5 % point of the standard normal: every interval of this project is a two-sided 95 % interval.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A two-sided 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedCounts:
    """Episodes of two runs on the same initial states: both succeeded, only A, only B, neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def total(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def difference(self) -> float:
        """Success rate of A minus that of B."""
        return (self.only_a - self.only_b) / self.total


def wilson_interval(successes: int, trials: int) -> Interval:
    """Wilson's score interval (1927): the rates p with |p̂ - p| <= z sqrt(p (1 - p) / n).

    It stays inside [0, 1] and has a positive width at 0 and at `trials` successes. Raises DataError unless
    0 <= successes <= trials and trials > 0.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise DataError(f"interval: expected 0 <= successes <= trials and trials > 0, got {successes} of {trials}")
    rate, z2 = successes / trials, _Z * _Z
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials)) / (1 + z2 / trials)
    # At 0 and at n successes the formula gives 0 and 1 exactly; rounding must not leave 1e-17 there.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return Interval(low, high)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact McNemar p-value: under equality each discordant pair is a fair coin.

    p = min(1, 2 P[Binomial(b + c, 1/2) <= min(b, c)]), summed in integers, so exact for any count.
    """
    if only_a < 0 or only_b < 0:
        raise DataError(f"McNemar: counts must not be negative, got {only_a} and {only_b}")
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): of the k-th smallest of m, max over j <= k of (m - j + 1) p_(j), at most 1.

    Rejecting what is then below a level keeps the probability of any false rejection below that level.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, least = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        least = min(1.0, max(least, (len(order) - place) * p_values[index]))
        corrected[index] = least
    return corrected


def paired_difference_interval(pairs: PairedCounts) -> Interval:
    """95 % interval of `pairs.difference`: Newcombe's square-and-add of two Wilson intervals (1998, method 10).

    The correlation φ of the pairs is lowered by n/2 in its numerator when positive, as in the paper.
    """
    n = pairs.total
    if n == 0:
        raise DataError("paired difference: no pairs; both runs must hold the same tasks, seeds and trials")
    successes_a, successes_b = pairs.both + pairs.only_a, pairs.both + pairs.only_b
    rate_a, rate_b = successes_a / n, successes_b / n
    wilson_a, wilson_b = wilson_interval(successes_a, n), wilson_interval(successes_b, n)
    margins = successes_a * (n - successes_a) * successes_b * (n - successes_b)
    cross = pairs.both * pairs.neither - pairs.only_a * pairs.only_b
    numerator = max(cross - n / 2, 0.0) if cross > 0 else float(cross)
    phi = numerator / math.sqrt(margins) if margins else 0.0

    def joined(first: float, second: float) -> float:
        return math.sqrt(max(0.0, first * first - 2 * phi * first * second + second * second))

    low = pairs.difference - joined(rate_a - wilson_a.low, wilson_b.high - rate_b)
    high = pairs.difference + joined(wilson_a.high - rate_a, rate_b - wilson_b.low)
    return Interval(max(-1.0, low), min(1.0, high))
