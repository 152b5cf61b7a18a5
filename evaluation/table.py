"""Every run of a configuration, resumably, and one Markdown table of them.

The configuration is YAML; paths in it are relative to it. The first run of a section is its reference: the others are
paired with it on the same initial states.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from calibrator.quantizers import parse_choice
from evaluation.actors import ActorSpec
from evaluation.benchmarks.registry import BENCHMARKS
from evaluation.compare import compare
from evaluation.results import RolloutResult
from evaluation.rollout import Control, Rollout, run
from evaluation.statistics import Interval, wilson_interval
from vla_policy.core.errors import ArtefactError, VlaError
from vla_policy.core.files import claim_folder
from vla_policy.core.outputs import FolderKind, atomic_path

_FOLDER = FolderKind("evaluation-table", "table.json")
_SECTION_KEYS = {"name", "title", "benchmark", "policy", "unnorm_key", "tasks", "trials", "seed", "runs"}
_RUN_KEYS = {"name", "engine", "uniform", "dtype", "control", "trials"}


@dataclass(frozen=True)
class PlannedRun:
    """One row: what to roll out and on how many initial states per task."""

    name: str
    rollout: Rollout
    trials: int


@dataclass(frozen=True)
class Section:
    """Runs on the same tasks; `tasks` empty means all of the benchmark."""

    name: str
    title: str
    tasks: tuple[str, ...]
    runs: tuple[PlannedRun, ...]


def read_config(path: Path) -> list[Section]:
    """The sections of the YAML at `path`. Raises ArtefactError naming the entry that is wrong."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ArtefactError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("sections"), list):
        raise ArtefactError(f"{path}: expected a mapping with a list `sections`")
    return [_section(entry, path, f"{path}: sections[{index}]") for index, entry in enumerate(content["sections"])]


def run_table(config: Path, out: Path, workers: int) -> Path:
    """Runs what is missing and writes `out/table.md`, anew after every run; returns its path.

    The sections take turns, so that every reference is done before the first variant.
    """
    sections = read_config(config)
    claim_folder(out, _FOLDER, inputs=[config])
    table = out / "table.md"
    results: dict[str, RolloutResult] = {}
    queue = [(turn, section, planned) for section in sections for turn, planned in enumerate(section.runs)]
    for _, section, planned in sorted(queue, key=lambda entry: entry[0]):
        slug = f"{section.name}-{planned.name}"
        results[slug] = run(planned.rollout, section.tasks, planned.trials, out / f"{slug}.json", workers)
        with atomic_path(table, None) as temporary:
            temporary.write_text(render(sections, results), encoding="utf-8")
    return table


def render(sections: list[Section], results: dict[str, RolloutResult]) -> str:
    """Markdown of the runs that `results` (by `section-run`) holds."""
    parts = []
    for section in sections:
        have = [(run.name, results[slug]) for run in section.runs if (slug := f"{section.name}-{run.name}") in results]
        if have:
            parts += [f"### {section.title}", "", *_rows(have), "", *_task_rows(*have[0]), ""]
    return "\n".join(parts)


def _rows(have: list[tuple[str, RolloutResult]]) -> list[str]:
    lines = [
        "| run | successes | rate, 95 % interval | minus reference, points | McNemar p | ms per decision |",
        "|---|---|---|---|---|---|",
    ]
    reference = have[0][1]
    for index, (name, result) in enumerate(have):
        difference = p_value = "reference" if index == 0 else ""
        if index:
            comparison = compare(result, reference.restricted_to(result))
            low, high = 100 * comparison.interval.low, 100 * comparison.interval.high
            difference = f"{100 * comparison.difference:+.1f} ({low:+.1f} to {high:+.1f})"
            p_value = f"{comparison.p_value:.2g}"
        trials = len(result.episodes)
        lines.append(
            f"| {name} | {result.successes}/{trials} | {_percent(result.successes, trials)} | {difference} | {p_value} "
            f"| {result.latency_ms:.0f} |"
        )
    return lines


def _task_rows(name: str, result: RolloutResult) -> list[str]:
    lines = [f"| task ({name}) | successes | rate, 95 % interval |", "|---|---|---|"]
    for task in result.tasks:
        outcomes = [episode.success for episode in result.of_task(task)]
        lines.append(f"| {task} | {sum(outcomes)}/{len(outcomes)} | {_percent(sum(outcomes), len(outcomes))} |")
    return lines


def _percent(successes: int, trials: int) -> str:
    interval: Interval = wilson_interval(successes, trials)
    return f"{100 * successes / trials:.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _section(entry: Any, path: Path, where: str) -> Section:
    _check_keys(entry, _SECTION_KEYS, {"name", "title", "benchmark", "policy", "trials", "runs"}, where)
    if entry["benchmark"] not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise ArtefactError(f"{where}.benchmark: {entry['benchmark']!r} is unknown; choose from {known}")
    runs = tuple(_run(run, entry, path, f"{where}.runs[{index}]") for index, run in enumerate(entry["runs"]))
    return Section(entry["name"], entry["title"], tuple(entry.get("tasks", ())), runs)


def _run(entry: Any, section: dict[str, Any], path: Path, where: str) -> PlannedRun:
    _check_keys(entry, _RUN_KEYS, {"name"}, where)
    control = entry.get("control", "none")
    if control not in get_args(Control):
        raise ArtefactError(f"{where}.control: {control!r} is unknown; choose from {', '.join(get_args(Control))}")
    try:
        uniform = parse_choice(entry["uniform"]) if "uniform" in entry else None
    except VlaError as error:
        raise ArtefactError(f"{where}.uniform: {error}") from error
    engine = entry.get("engine")
    actor = ActorSpec(
        kind="engine" if engine else "policy",
        folder=path.parent / (engine or section["policy"]),
        unnorm_key=section.get("unnorm_key"),
        uniform=uniform,
        dtype=entry.get("dtype", "float32"),
    )
    rollout = Rollout(section["benchmark"], actor, section.get("seed", 7), control)
    return PlannedRun(entry["name"], rollout, entry.get("trials", section["trials"]))


def _check_keys(entry: Any, known: set[str], required: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise ArtefactError(f"{where}: expected a mapping, got {type(entry).__name__}")
    if wrong := sorted(set(entry) - known) or sorted(required - set(entry)):
        problem = "is unknown" if wrong[0] in entry else "is missing"
        raise ArtefactError(f"{where}: key {wrong[0]!r} {problem}; known: {', '.join(sorted(known))}")
