"""A chain of stages that resumes: each records what it was made from, and is skipped when nothing of that changed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import read_json, sha256_file, sha256_folder, write_json

_KIND = "stage"


@dataclass(frozen=True)
class Stage:
    """One step from artefacts to artefacts.

    parents: files and folders that it reads; a parent is an input of the chain or an output of an earlier stage.
    settings: everything else that shapes the result, in JSON's types.
    sources: folders whose Python code shapes the result.
    outputs: files and folders that `run` leaves behind, complete or not at all.
    """

    name: str
    title: str
    parents: tuple[Path, ...]
    settings: dict[str, Any]
    sources: tuple[Path, ...]
    outputs: tuple[Path, ...]
    run: Callable[[], None]


@dataclass(frozen=True)
class StageResult:
    """Whether the stage ran, how long it took when it did, and the sha256 of its outputs by file name."""

    name: str
    title: str
    skipped: bool
    duration_s: float
    outputs: dict[str, str]


def run_stages(stages: Sequence[Stage], records: Path, say: Callable[[str], None] = print) -> list[StageResult]:
    """Runs the stages in order, skipping those whose record still holds. `records`: the folder of the records.

    Raises ArtefactError where a finished output was changed by somebody else: nothing is overwritten.
    """
    return [
        _run_stage(stage, records, f"[{number}/{len(stages)}] {stage.title}", say)
        for number, stage in enumerate(stages, 1)
    ]


def _run_stage(stage: Stage, records: Path, heading: str, say: Callable[[str], None]) -> StageResult:
    record_path = records / f"{stage.name}.stage.json"
    made_from = _made_from(stage)
    if record_path.is_file():
        record = read_json(record_path, kind=_KIND)
        _refuse_altered(stage, record["outputs"])
        if record["made_from"] == made_from and all(path.exists() for path in stage.outputs):
            say(f"{heading}: unchanged, made in {record['duration_s']:.1f} s")
            return StageResult(stage.name, stage.title, True, record["duration_s"], record["outputs"])
        record_path.unlink()
    say(f"{heading} ...")
    started = time.monotonic()
    stage.run()
    duration_s = time.monotonic() - started
    missing = [str(path) for path in stage.outputs if not path.exists()]
    assert not missing, f"stage {stage.name} promised {missing}"
    outputs = _hashes(stage.outputs)
    content = {"made_from": made_from, "outputs": outputs, "duration_s": duration_s, "name": stage.name}
    write_json(record_path, {"schema_version": 1, "kind": _KIND, **content})
    say(f"{heading}: {duration_s:.1f} s")
    return StageResult(stage.name, stage.title, False, duration_s, outputs)


def _refuse_altered(stage: Stage, recorded: dict[str, str]) -> None:
    for path in stage.outputs:
        if path.exists() and _hash(path) != recorded.get(path.name):
            raise ArtefactError(
                f"{path}: changed or truncated since the stage {stage.name!r} made it; "
                "restore it, or delete it to have it made again"
            )


def _made_from(stage: Stage) -> dict[str, Any]:
    return {
        "parents": {str(path): _hash(path) for path in stage.parents},
        "settings": stage.settings,
        "sources": {path.name: sha256_folder(path, ["**/*.py"]) for path in stage.sources},
    }


def _hashes(paths: Sequence[Path]) -> dict[str, str]:
    return {path.name: _hash(path) for path in paths}


def _hash(path: Path) -> str:
    return sha256_folder(path, ["**/*"]) if path.is_dir() else sha256_file(path)
