"""Runs what a configuration lists and nobody has run yet."""

from dataclasses import replace
from pathlib import Path

from evaluation.actors import ActorSpec
from evaluation.rollout import run
from evaluation.tables.arms import prepare
from evaluation.tables.config import PlannedRun, Section, read_config
from evaluation.tables.figure import draw
from evaluation.tables.markdown import Row, render
from vla_policy.core.files import claim_folder
from vla_policy.core.outputs import FolderKind, atomic_path

_FOLDER = FolderKind("evaluation-table", "table.json")


def run_table(config: Path, out: Path, workers: int) -> Path:
    """Runs what is missing and writes `out/table.md` and a drawing of every section, anew after every run; returns the
    table's path.

    The sections take turns, so that every reference is done before the first variant.
    """
    sections = read_config(config)
    claim_folder(out, _FOLDER, inputs=[config])
    table = out / "table.md"
    rows: dict[str, Row] = {}
    queue = [(turn, section, planned) for section in sections for turn, planned in enumerate(section.runs)]
    for _, section, planned in sorted(queue, key=lambda entry: entry[0]):
        slug = f"{section.name}-{planned.name}"
        planned = _with_weights(section, planned, out / section.name)
        result = run(planned.rollout, section.tasks, planned.trials, out / f"{slug}.json", workers)
        rows[slug] = Row(result, planned.rollout.actor.size())
        with atomic_path(table, None) as temporary:
            temporary.write_text(render(sections, rows), encoding="utf-8")
        with atomic_path(out / f"{section.name}.svg", None) as temporary:
            temporary.write_text(draw(section, rows), encoding="utf-8")
    return table


def _with_weights(section: Section, planned: PlannedRun, folder: Path) -> PlannedRun:
    """The run, of which an arm's weights are made."""
    if planned.arm is None:
        return planned
    actor, rollout = planned.rollout.actor, planned.rollout
    assert section.materials is not None and isinstance(actor, ActorSpec)
    policy, weights = prepare(section.materials, planned.arm, folder, planned.name)
    return replace(planned, rollout=replace(rollout, actor=replace(actor, folder=policy, weights=weights)))
