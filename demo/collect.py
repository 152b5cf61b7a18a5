"""Demonstration episodes from scripted experts, or from a policy's own rollouts labelled by the expert (DAgger).

An episode is named by its index: the index seeds everything in it, so an interrupted collection continues and any
number of workers give the same files. Tasks take turns, so that any prefix of the collection is balanced.
"""

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from calibrator.tensors import disk_errors
from demo.dataset import encode_png
from demo.teachers import Lesson, LiberoTeacher, MetaWorldTeacher, Teacher
from vla_policy.core import cli
from vla_policy.core.errors import DataError
from vla_policy.core.files import claim_folder, sha256_policy, write_json
from vla_policy.core.image import resize
from vla_policy.core.observation import Actor, Observation
from vla_policy.core.outputs import FolderKind, atomic_path

TEACHERS: dict[str, type[LiberoTeacher] | type[MetaWorldTeacher]] = {
    "libero_object": LiberoTeacher,
    "metaworld": MetaWorldTeacher,
}
IMAGE_SIZE = 112
_FOLDER = FolderKind("demonstrations", "collection.json")

# DAgger's beta: the expert takes this share of a driving policy's decisions, so that a stuck policy moves on.
_EXPERT_SHARE = 0.25

# A task's simulator takes a second to load: each task keeps it for so many episodes.
_BLOCK = 8


@dataclass(frozen=True)
class Job:
    """What to collect. driver: "expert" or a policy folder. seed: shifts all episodes' seeds."""

    benchmark: str
    out: Path
    driver: str
    seed: int
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """One episode: kept says that a file was written for training."""

    index: int
    task: str
    success: bool
    kept: bool


def episode_path(out: Path, index: int) -> Path:
    """Where episode `index` is stored."""
    return out / f"{index:06d}.safetensors"


def failure_path(out: Path, index: int) -> Path:
    """The note that an expert's episode failed and was dropped."""
    return out / f"{index:06d}.failed.json"


def task_of(index: int, tasks: tuple[str, ...]) -> str:
    """Tasks take turns in blocks of eight episodes."""
    return tasks[index // _BLOCK % len(tasks)]


def make_teacher(benchmark: str) -> Teacher:
    """The benchmark's source of episodes. Raises DataError where its simulator is not installed."""
    try:
        return TEACHERS[benchmark]()
    except ModuleNotFoundError as error:
        extra = benchmark.partition("_")[0]
        message = f"benchmark {benchmark}: Python module {error.name!r} is missing; pip install 'vla-deploy[{extra}]'"
        raise DataError(message) from error


def claim(job: Job) -> None:
    """Notes in the folder what its episodes are, or checks it: two collections in one folder would mix silently.

    Raises DataError naming the first setting that differs, ArtefactError for a folder of something else.
    """
    policy = None if job.driver == "expert" else Path(job.driver)
    settings: dict[str, Any] = {
        "benchmark": job.benchmark,
        "driver": job.driver if policy is None else sha256_policy(policy),
        "seed": job.seed,
        "tasks": list(job.tasks),
    }
    note = job.out / _FOLDER.index
    stored = claim_folder(job.out, _FOLDER, settings, [policy])
    for name, value in settings.items():
        if stored.get(name) != value:
            raise DataError(f"{note}: {name} is {stored.get(name)!r}, asked for {value!r}; use another --out folder")


def collect_block(job: Job, indices: list[int]) -> list[Outcome]:
    """Runs the episodes `indices` that are not there yet, one after another, in one simulator."""
    missing = [i for i in indices if not (episode_path(job.out, i).exists() or failure_path(job.out, i).exists())]
    if not missing:
        return []
    teacher, actor = _tools(job)
    return [_collect_episode(job, index, teacher, actor) for index in missing]


_loaded: dict[tuple[str, str], tuple[Teacher, Actor | None]] = {}


def _tools(job: Job) -> tuple[Teacher, Actor | None]:
    """The process's simulator and driving policy, loaded once."""
    key = (job.benchmark, job.driver)
    if key not in _loaded:
        actor: Actor | None = None
        if job.driver != "expert":
            import torch

            from calibrator.families import TorchActor

            torch.set_num_threads(1)
            actor = TorchActor.load(Path(job.driver))
        _loaded[key] = (make_teacher(job.benchmark), actor)
    return _loaded[key]


def _collect_episode(job: Job, index: int, teacher: Teacher, actor: Actor | None) -> Outcome:
    task = task_of(index, job.tasks)
    rng = np.random.default_rng([job.seed, index])
    observation = teacher.start(task, rng)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("png", "state", "action", "valid", "aux", "seen_at")}
    success = done = False
    while not done and teacher.teachable():
        lesson = teacher.lesson()
        _record(columns, observation, lesson)
        if actor is None or rng.random() < _EXPERT_SHARE:
            executed = teacher.disturbed(lesson.actions[0], rng)
        else:
            executed = actor.act(observation).action
        result = teacher.step(executed)
        observation, success, done = result.observation, result.success, result.done
    kept = success if actor is None else bool(columns["png"])
    if kept:
        metadata = {
            "benchmark": teacher.name,
            "driver": "expert" if actor is None else "policy",
            "instructions": json.dumps(teacher.instructions),
            "layout": teacher.layout,
            "seed": str(job.seed),
            "success": str(success).lower(),
            "task": task,
        }
        _write_episode(episode_path(job.out, index), columns, metadata)
    else:
        note = {"schema_version": 1, "kind": "failed-episode", "task": task, "layout": teacher.layout}
        write_json(failure_path(job.out, index), note)
    return Outcome(index, task, success, kept)


def _record(columns: dict[str, list[np.ndarray]], observation: Observation, lesson: Lesson) -> None:
    if observation.state is None:
        raise DataError("a demonstration needs the robot's state in every observation")
    columns["png"].append(encode_png(resize(observation.image, IMAGE_SIZE)))
    columns["state"].append(observation.state)
    columns["action"].append(lesson.actions.astype(np.float32))
    columns["valid"].append(lesson.valid)
    columns["aux"].append(lesson.aux)
    columns["seen_at"].append(lesson.seen_at)


def _write_episode(path: Path, columns: dict[str, list[np.ndarray]], metadata: dict[str, str]) -> None:
    from safetensors.numpy import save_file

    pictures = columns.pop("png")
    tensors = {name: np.stack(rows) for name, rows in columns.items()}
    tensors["png"] = np.concatenate(pictures)
    tensors["png_end"] = np.cumsum([len(picture) for picture in pictures])
    with atomic_path(path, None) as temporary, disk_errors():
        save_file(tensors, temporary, metadata=metadata)


def collect(job: Job, episodes: int, workers: int) -> list[Outcome]:
    """Collects episodes 0 .. `episodes` - 1 that are missing in `job.out`. Returns the outcomes of this run."""
    blocks = [list(range(first, min(first + _BLOCK, episodes))) for first in range(0, episodes, _BLOCK)]
    outcomes: list[Outcome] = []
    with tqdm(total=episodes, unit="episode", file=sys.stderr) as progress:
        for done, block in _run(job, blocks, workers):
            outcomes += block
            progress.update(done)
            progress.set_postfix(dropped=sum(not o.kept for o in outcomes), success=sum(o.success for o in outcomes))
    return outcomes


def _run(job: Job, blocks: list[list[int]], workers: int) -> Iterator[tuple[int, list[Outcome]]]:
    if workers == 1:
        for indices in blocks:
            yield len(indices), collect_block(job, indices)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(_sized_block, [(job, indices) for indices in blocks])


def _sized_block(work: tuple[Job, list[int]]) -> tuple[int, list[Outcome]]:
    return len(work[1]), collect_block(*work)


def main(argv: list[str] | None = None) -> int:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(prog="python -m demo.collect", description=__doc__.split("\n\n")[0])
    parser.add_argument("--benchmark", choices=sorted(TEACHERS), required=True)
    parser.add_argument("--episodes", type=int, required=True, help="episodes to try, those already there included")
    parser.add_argument("--out", type=Path, required=True, help="folder for one safetensors file per episode")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--driver", default="expert", metavar="expert|POLICY_DIR", help="who acts; default: %(default)s"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="task names; default: all of the benchmark")
    parser.add_argument("--workers", type=int, default=1, help="processes, one renderer each; default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.episodes < 1 or arguments.workers < 1 or arguments.seed < 0:
        raise DataError("--episodes and --workers must be at least 1 and --seed at least 0")
    known = make_teacher(arguments.benchmark).tasks
    tasks = tuple(arguments.tasks or known)
    unknown = sorted(set(tasks) - set(known))
    if unknown:
        raise DataError(f"--tasks: unknown {', '.join(unknown)}; choose from: {', '.join(known)}")
    job = Job(arguments.benchmark, arguments.out, arguments.driver, arguments.seed, tasks)
    claim(job)
    outcomes = collect(job, arguments.episodes, arguments.workers)
    tried, succeeded = Counter(o.task for o in outcomes), Counter(o.task for o in outcomes if o.success)
    for task in tasks:
        print(f"{task}: {succeeded[task]} of {tried[task]} episodes succeeded")
    print(f"{sum(o.kept for o in outcomes)} episodes written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
