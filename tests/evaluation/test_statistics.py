"""Oracles: the roots of Wilson's defining equation, scipy's exact binomial test, published examples, and coverage."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binomtest, norm

from evaluation.statistics import PairedCounts, mcnemar_exact, paired_difference_interval, wilson_interval
from vla_policy.core.errors import DataError


@pytest.mark.parametrize(("successes", "trials"), [(1, 2), (7, 10), (57, 60), (199, 200), (2, 500)])
def test_wilson_limits_solve_the_score_equation(successes: int, trials: int) -> None:
    z, rate = norm.ppf(0.975), successes / trials

    def score(p: float) -> float:
        return (rate - p) ** 2 - z * z * p * (1 - p) / trials

    interval = wilson_interval(successes, trials)
    assert interval.low == pytest.approx(brentq(score, 1e-12, rate), abs=1e-9)
    assert interval.high == pytest.approx(brentq(score, rate, 1 - 1e-12), abs=1e-9)


@pytest.mark.parametrize(("successes", "trials"), [(0, 12), (12, 12), (9, 12), (0, 1)])
def test_wilson_agrees_with_scipy(successes: int, trials: int) -> None:
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    interval = wilson_interval(successes, trials)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_at_the_ends_is_exact_and_has_width() -> None:
    assert wilson_interval(0, 50).low == 0.0
    assert wilson_interval(50, 50).high == 1.0
    assert wilson_interval(50, 50).low == pytest.approx(50 / (50 + norm.ppf(0.975) ** 2))


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, trials: int) -> None:
    with pytest.raises(DataError, match=f"got {successes} of {trials}"):
        wilson_interval(successes, trials)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (0, 6), (3, 12), (5, 5), (40, 21), (700, 600)])
def test_mcnemar_agrees_with_scipys_exact_binomial_test(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(only_b, only_a) == mcnemar_exact(only_a, only_b)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(DataError, match="must not be negative"):
        mcnemar_exact(-1, 3)


def test_paired_interval_reproduces_newcombes_published_example() -> None:
    interval = paired_difference_interval(PairedCounts(36, 12, 2, 0))
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.0569, 0.3404)


def test_paired_interval_is_antisymmetric_and_contains_the_difference() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        both, only_a, only_b, neither = map(int, rng.integers(0, 30, 4))
        if both + only_a + only_b + neither == 0:
            continue
        forward = PairedCounts(both, only_a, only_b, neither)
        interval = paired_difference_interval(forward)
        mirrored = paired_difference_interval(PairedCounts(both, only_b, only_a, neither))
        assert interval.low <= forward.difference <= interval.high
        assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low), abs=1e-12)


def test_paired_interval_covers_the_true_difference() -> None:
    rng = np.random.default_rng(1)
    cells = np.array([0.80, 0.12, 0.03, 0.05])
    covered = 0
    for counts in rng.multinomial(200, cells, size=2000):
        interval = paired_difference_interval(PairedCounts(*map(int, counts)))
        covered += interval.low <= cells[1] - cells[2] <= interval.high
    assert 0.93 <= covered / 2000 <= 0.98


def test_paired_interval_needs_pairs() -> None:
    with pytest.raises(DataError, match="no pairs"):
        paired_difference_interval(PairedCounts(0, 0, 0, 0))
