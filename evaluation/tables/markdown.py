"""Finished runs as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.compare import Comparison, compare
from evaluation.results import RolloutResult
from evaluation.statistics import holm, wilson_interval
from evaluation.tables.config import Section


@dataclass(frozen=True)
class Row:
    """A finished run. stored: bytes of its layers' weights with their scales."""

    result: RolloutResult
    stored: int


def render(sections: Sequence[Section], rows: Mapping[str, Row]) -> str:
    """Markdown of the runs that `rows` (by `section-run`) holds.

    p-values of one section are corrected together (Holm), those against the reference and those of its pairs.
    """
    parts = []
    for section in sections:
        have = {run.name: rows[slug] for run in section.runs if (slug := f"{section.name}-{run.name}") in rows}
        if have:
            reference = next(iter(have))
            pairs = [(name, reference) for name in list(have)[1:]]
            pairs += [pair for pair in section.pairs if set(pair) <= set(have)]
            compared = {pair: _paired(*(have[name].result for name in pair)) for pair in pairs}
            corrected = dict(zip(pairs, holm([compared[pair].p_value for pair in pairs]), strict=True))
            parts += [f"### {section.title}", "", *_rows(have, compared, corrected), ""]
            parts += [*_pair_rows(pairs[len(have) - 1 :], compared, corrected), *_task_rows(reference, have), ""]
    return "\n".join(parts)


_Pair = tuple[str, str]


def _paired(first: RolloutResult, second: RolloutResult) -> Comparison:
    """On the initial states that both have run."""
    shared = first.restricted_to(second)
    return compare(shared, second.restricted_to(shared))


def _rows(have: Mapping[str, Row], compared: Mapping[_Pair, Comparison], corrected: Mapping[_Pair, float]) -> list[str]:
    lines = [
        "| run | MB of weights | successes | rate, 95 % interval | minus reference, points | McNemar p (Holm) "
        "| ms per decision |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = next(iter(have))
    for name, row in have.items():
        pair, result = (name, reference), row.result
        told = (
            f"{_points(compared[pair])} | {_values(pair, compared, corrected)}" if pair in compared else "reference | "
        )
        trials = len(result.episodes)
        lines.append(
            f"| {name} | {row.stored / 1e6:.2f} | {result.successes}/{trials} | {_percent(result.successes, trials)} "
            f"| {told} | {result.latency_ms:.0f} |"
        )
    return lines


def _pair_rows(
    pairs: Sequence[_Pair], compared: Mapping[_Pair, Comparison], corrected: Mapping[_Pair, float]
) -> list[str]:
    if not pairs:
        return []
    lines = ["| run | against | only the first, only the second | difference, points | McNemar p (Holm) |"]
    lines.append("|---|---|---|---|---|")
    for pair in pairs:
        counts = compared[pair].pairs
        lines.append(
            f"| {pair[0]} | {pair[1]} | {counts.only_a}, {counts.only_b} of {counts.total} "
            f"| {_points(compared[pair])} | {_values(pair, compared, corrected)} |"
        )
    return [*lines, ""]


def _points(comparison: Comparison) -> str:
    low, high = 100 * comparison.interval.low, 100 * comparison.interval.high
    return f"{100 * comparison.difference:+.1f} ({low:+.1f} to {high:+.1f})"


def _values(pair: _Pair, compared: Mapping[_Pair, Comparison], corrected: Mapping[_Pair, float]) -> str:
    return f"{compared[pair].p_value:.2g} ({corrected[pair]:.2g})"


def _task_rows(name: str, have: Mapping[str, Row]) -> list[str]:
    lines = [f"| task ({name}) | successes | rate, 95 % interval |", "|---|---|---|"]
    result = have[name].result
    for task in result.tasks:
        outcomes = [episode.success for episode in result.of_task(task)]
        lines.append(f"| {task} | {sum(outcomes)}/{len(outcomes)} | {_percent(sum(outcomes), len(outcomes))} |")
    return lines


def _percent(successes: int, trials: int) -> str:
    interval = wilson_interval(successes, trials)
    return f"{100 * successes / trials:.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
