"""Settings of short sensitivity runs, and what an unfinished one holds and asks for."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from calibrator.sensitivity.executors import LocalExecutor, Task
from calibrator.sensitivity.measure import journal_folder
from calibrator.sensitivity.run import RunOptions
from calibrator.sensitivity.scores import ScoreSettings


class SilentBar:
    """Stands in for the progress bar; interrupts the run once `stop` evaluations are done."""

    def __init__(self, stop: int = 10**9, **_: Any) -> None:
        self.left = stop

    def __call__(self, **_: Any) -> "SilentBar":
        return self

    def __enter__(self) -> "SilentBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: float) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


GLOBS = ("projector.*", "language_model.model.layers.1.mlp.*", "vision_backbone.featurizer.blocks.0.*")
SAID: list[str] = []
OPTIONS = RunOptions(unit_globs=GLOBS, progress=SilentBar(), say=SAID.append)
SCORES = ScoreSettings(bins=4)


def kept(out: Path) -> int:
    """Records in the journal of an unfinished run."""
    with sqlite3.connect(journal_folder(out) / "records.sqlite") as records:
        (count,) = records.execute("SELECT count(*) FROM losses").fetchone()
    return int(count)


def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """What is evaluated from here on."""
    seen: list[Task] = []
    original = LocalExecutor.run

    def watched(self: LocalExecutor, work: Any, ref: Any) -> Any:
        seen.extend(one for one in work if isinstance(one, Task))
        return original(self, work, ref)

    monkeypatch.setattr(LocalExecutor, "run", watched)
    return seen
