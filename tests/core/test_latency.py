"""Rolling statistics against NumPy and by hand."""

import math

import numpy as np

from vla_policy.core.latency import RateCounter, RollingWindow

S = 10**9


def test_percentiles_are_those_of_the_last_samples() -> None:
    window = RollingWindow(100)
    empty = window.percentiles()
    assert empty.count == 0 and all(math.isnan(value) for value in (empty.p50, empty.p99, empty.maximum))
    values = np.random.default_rng(0).permutation(250).astype(float)
    for value in values:
        window.add(float(value))
    found, last = window.percentiles(), values[-100:]
    assert found.count == 100
    assert [found.p50, found.p99, found.maximum] == [np.quantile(last, 0.5), np.quantile(last, 0.99), last.max()]


def test_diagnostics_look_at_the_last_thousand() -> None:
    window = RollingWindow()
    for value in range(1500):
        window.add(float(value))
    assert (window.percentiles().count, window.percentiles().p50) == (1000, 999.5)


def test_a_rate_is_of_the_last_seconds_only() -> None:
    counter = RateCounter(5 * S)
    assert counter.rate_hz(0) == 0.0
    for tenth in range(101):  # 10 Hz from 0 to 10 s: 51 of them in the last 5 s
        counter.add(tenth * S // 10)
    assert counter.rate_hz(10 * S) == 51 / 5
    assert counter.rate_hz(14 * S) == 11 / 5, "those of 9 to 10 s, over the time since"
    assert counter.rate_hz(16 * S) == 0.0


def test_a_clock_that_was_set_back_starts_the_count_anew() -> None:
    counter = RateCounter(5 * S)
    for tenth in range(50):
        counter.add(100 * S + tenth * S // 10)
    assert counter.rate_hz(3 * S) == 0.0
    for now_s in (4, 5):
        counter.add(now_s * S)
    assert counter.rate_hz(5 * S) == 2.0
