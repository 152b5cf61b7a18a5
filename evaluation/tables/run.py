"""Runs what a configuration lists and nobody has run yet."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evaluation.actors import ActorSpec
from evaluation.results import RolloutResult
from evaluation.rollout import Rollout, run
from evaluation.tables.arms import places, prepare
from evaluation.tables.config import PlannedRun, Section, read_config
from evaluation.tables.figure import draw
from evaluation.tables.markdown import Row, render
from vla_policy.core.files import claim_folder
from vla_policy.core.outputs import FolderKind, atomic_path

_FOLDER = FolderKind("evaluation-table", "table.json")


def run_table(config: Path, out: Path, workers: int) -> Path:
    """Runs what is missing and writes `out/table.md` and a drawing of every section, anew after every run; returns the
    table's path.

    What an earlier call finished is in the table from the beginning, maybe with fewer trials than are asked for now.
    The sections take turns, so that every reference is done before the first variant.
    """
    sections = read_config(config)
    claim_folder(out, _FOLDER, inputs=[config])
    table = out / "table.md"
    rows = _earlier(sections, out)
    queue = [(turn, section, planned) for section in sections for turn, planned in enumerate(section.runs)]
    for _, section, planned in sorted(queue, key=lambda entry: entry[0]):
        slug = f"{section.name}-{planned.name}"
        if planned.arm is not None:
            assert section.materials is not None
            prepare(section.materials, planned.arm, out / section.name, planned.name)
        rollout = _placed(section, planned, out)
        result = run(rollout, section.tasks, planned.trials, out / f"{slug}.json", workers)
        rows[slug] = Row(result, rollout.actor.size())
        with atomic_path(table, None) as temporary:
            temporary.write_text(render(sections, rows), encoding="utf-8")
        with atomic_path(out / f"{section.name}.svg", None) as temporary:
            temporary.write_text(draw(section, rows), encoding="utf-8")
    return table


def _earlier(sections: Sequence[Section], out: Path) -> dict[str, Row]:
    """The finished runs in `out` by `section-run`; those of other inputs are left to their turn, which refuses them."""
    rows = {}
    for section in sections:
        for planned in section.runs:
            slug = f"{section.name}-{planned.name}"
            rollout, path = _placed(section, planned, out), out / f"{slug}.json"
            made = rollout.actor.weights if isinstance(rollout.actor, ActorSpec) else None
            if path.exists() and (made is None or made.exists()):
                result = RolloutResult.read(path)
                if result.settings == rollout.settings():
                    rows[slug] = Row(result, rollout.actor.size())
    return rows


def _placed(section: Section, planned: PlannedRun, out: Path) -> Rollout:
    """The run with the weights that its arm makes."""
    if planned.arm is None:
        return planned.rollout
    actor = planned.rollout.actor
    assert section.materials is not None and isinstance(actor, ActorSpec)
    policy, weights = places(section.materials, planned.arm, out / section.name, planned.name)
    return replace(planned.rollout, actor=replace(actor, folder=policy, weights=weights))
