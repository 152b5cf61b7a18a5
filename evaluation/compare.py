"""Two runs on the same initial states: is the difference in success rate more than chance?"""

from dataclasses import dataclass

from evaluation.results import RolloutResult
from evaluation.statistics import Interval, PairedCounts, mcnemar_exact, paired_difference_interval
from vla_policy.core.errors import DataError


@dataclass(frozen=True)
class Comparison:
    """Paired counts of runs A and B, success rate A minus B with its 95 % interval, exact McNemar p-value."""

    pairs: PairedCounts
    interval: Interval
    p_value: float

    @property
    def difference(self) -> float:
        return self.pairs.difference


def compare(first: RolloutResult, second: RolloutResult) -> Comparison:
    """Pairs the episodes by task and trial.

    Raises DataError when the runs differ in their episodes or when a pair started from different states: then there
    is nothing to pair.
    """
    others = {episode.key: episode for episode in second.episodes}
    mine = {episode.key for episode in first.episodes}
    if mine != set(others):
        task, trial = sorted(mine ^ set(others))[0]
        holder = "first" if (task, trial) in mine else "second"
        raise DataError(
            f"only the {holder} run holds task {task!r} trial {trial} ({len(mine)} and {len(others)} episodes); "
            "paired runs need the same --tasks and --trials"
        )
    outcomes = []
    for episode in first.episodes:
        other = others[episode.key]
        if episode.initial_state != other.initial_state:
            raise DataError(
                f"task {episode.task!r} trial {episode.trial} started from different states in the two runs; "
                "paired runs need the same --benchmark and --seed"
            )
        outcomes.append((episode.success, other.success))
    kinds = ((True, True), (True, False), (False, True), (False, False))
    pairs = PairedCounts(*(outcomes.count(kind) for kind in kinds))
    return Comparison(pairs, paired_difference_interval(pairs), mcnemar_exact(pairs.only_a, pairs.only_b))


def describe(comparison: Comparison) -> str:
    """One paragraph for a terminal."""
    pairs = comparison.pairs
    return (
        f"{pairs.total} paired episodes: both succeeded {pairs.both}, only A {pairs.only_a}, only B {pairs.only_b}, "
        f"neither {pairs.neither}\n"
        f"success rate A - B: {100 * comparison.difference:+.1f} points "
        f"(95 % interval {100 * comparison.interval.low:+.1f} to {100 * comparison.interval.high:+.1f})\n"
        f"exact McNemar p = {comparison.p_value:.3g}"
    )
