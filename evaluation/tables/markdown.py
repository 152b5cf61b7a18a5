"""Finished runs as Markdown: every run beside the reference, the claims, the spread over calibration states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from evaluation.actors import Size
from evaluation.compare import Comparison, compare
from evaluation.results import RolloutResult
from evaluation.statistics import holm, wilson_interval
from evaluation.tables.config import PlannedRun, Section
from evaluation.tables.curves import curves_of, states_seed

_RUNS = """Bits: codes per weight, without scales. MB: codes with scales and what else comes with them. Rates with
Wilson's 95 % interval. Won, lost: initial states on which only this run, or only {reference}, succeeded, of those that
both have run. Difference of rates on these, in points, with Newcombe's 95 % interval for pairs (1998, method 10). p:
exact two-sided McNemar test, not corrected."""
_CLAIMS = """Claims, each on the initial states that both runs have run; columns as above, won and lost against the
second run. Holm: p corrected for all {count} claims of the section{unfinished}."""


@dataclass(frozen=True)
class Row:
    """A finished run and what its weights take."""

    result: RolloutResult
    size: Size


def render(sections: Sequence[Section], rows: Mapping[str, Row]) -> str:
    """Markdown of the runs that `rows` (by `section-run`) holds, of sections whose first run is among them.

    p-values of a section's claims are corrected together (Holm). A claim whose runs are not finished counts as p = 1,
    so that a corrected value only falls while the others finish.
    """
    parts = []
    for section in sections:
        have = {run.name: rows[slug] for run in section.runs if (slug := f"{section.name}-{run.name}") in rows}
        if have and section.runs[0].name in have:
            results = {name: row.result for name, row in have.items()}
            parts += [f"### {section.title}", "", *_run_rows(have), *_claim_rows(section.pairs, results)]
            parts += [*_spread_rows(section.runs, results), *_task_rows(*next(iter(results.items())))]
    return "\n".join(parts)


def _run_rows(have: Mapping[str, Row]) -> list[str]:
    reference, first = next((name, row.result) for name, row in have.items())
    lines = [
        f"| run | bits | MB | successes | rate, % | won, lost against {reference} | difference | p | ms per decision |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in have.items():
        result = row.result
        against = "reference | | " if name == reference else " | ".join(_against(_paired(result, first)))
        lines.append(
            f"| {name} | {row.size.average_bits:.2f} | {row.size.stored_bytes / 1e6:.2f} | {_rate(result.outcomes)} "
            f"| {against} | {result.latency_ms:.0f} |"
        )
    return [*lines, "", _RUNS.format(reference=reference).replace("\n", " "), ""]


def _claim_rows(claims: Sequence[tuple[str, str]], results: Mapping[str, RolloutResult]) -> list[str]:
    finished = {pair: _paired(*(results[name] for name in pair)) for pair in claims if set(pair) <= set(results)}
    if not finished:
        return []
    corrected = holm([finished[pair].p_value if pair in finished else 1.0 for pair in claims])
    lines = ["| claim | against | won, lost | difference | p | Holm |", "|---|---|---|---|---|---|"]
    for (name, other), value in zip(claims, corrected, strict=True):
        if (name, other) in finished:
            told = " | ".join(_against(finished[name, other]))
            lines.append(f"| {name} | {other} | {told} | {value:.2g} |")
    open_claims = len(claims) - len(finished)
    unfinished = f"; {open_claims} of them, not played yet, count as p = 1" if open_claims else ""
    note = _CLAIMS.format(count=len(claims), unfinished=unfinished).replace("\n", " ")
    return [*lines, "", note, ""]


def _spread_rows(runs: Sequence[PlannedRun], results: Mapping[str, RolloutResult]) -> list[str]:
    """One line for finished runs that differ in their calibration states alone."""
    finished = [run for run in runs if run.name in results]
    lines = []
    for alike in (size for curve in curves_of(finished) for size in curve.sizes if len(size) > 1):
        mine = [results[run.name] for run in alike]
        shared = [reduce(RolloutResult.restricted_to, mine, result) for result in mine]
        rates = [100 * result.successes / len(result.episodes) for result in shared]
        seeds = ", ".join(str(states_seed(run)) for run in alike)
        spread = f"{min(rates):.1f} to {max(rates):.1f} % of {len(shared[0].episodes)}"
        lines.append(f"| {alike[0].name} | {seeds} | {spread} |")
    if not lines:
        return []
    head = ["| the same with other calibration states | seeds | least to most successes, common initial states |"]
    return [*head, "|---|---|---|", *lines, ""]


def _task_rows(name: str, result: RolloutResult) -> list[str]:
    lines = [f"| task ({name}) | successes | rate, % |", "|---|---|---|"]
    lines += [f"| {task} | {_rate([episode.success for episode in result.of_task(task)])} |" for task in result.tasks]
    return [*lines, ""]


def _paired(first: RolloutResult, second: RolloutResult) -> Comparison:
    """On the initial states that both have run."""
    shared = first.restricted_to(second)
    return compare(shared, second.restricted_to(shared))


def _against(comparison: Comparison) -> list[str]:
    """Three cells: won and lost, the difference with its interval, p."""
    pairs, interval = comparison.pairs, comparison.interval
    difference = f"{100 * comparison.difference:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
    return [f"{pairs.only_a}, {pairs.only_b} of {pairs.total}", difference, f"{comparison.p_value:.2g}"]


def _rate(outcomes: Sequence[bool]) -> str:
    """Two cells: counts, and the rate with its interval."""
    successes, trials = sum(outcomes), len(outcomes)
    interval = wilson_interval(successes, trials)
    percent = f"{100 * successes / trials:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
    return f"{successes}/{trials} | {percent}"
