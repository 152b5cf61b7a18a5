"""Closed-loop episodes: a policy acts in a simulator until it succeeds or its steps are used up."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from tqdm import tqdm

from evaluation.actors import Size
from evaluation.benchmarks.base import BenchmarkEnv
from evaluation.benchmarks.registry import make_env
from evaluation.results import KIND, Episode, Journal, RolloutResult, Settings
from evaluation.video import write_video
from vla_policy.core.errors import DataError, EngineError, VlaError
from vla_policy.core.files import claim_folder
from vla_policy.core.observation import Actor, Observation
from vla_policy.core.outputs import FolderKind, check_file
from vla_policy.core.policy_config import PolicyConfig

Control = Literal["none", "blind", "wrong_instruction"]
_FILMS = FolderKind("films", "films.json", ("*.mp4",))


EnvFactory = Callable[[str, PolicyConfig], BenchmarkEnv]


class ActorRecipe(Protocol):
    """Something picklable that becomes an actor in a worker process."""

    def settings(self) -> dict[str, Any]:
        """What identifies the actor in a result, as JSON values."""
        ...

    def config(self) -> PolicyConfig:
        """The policy's configuration, read without loading the weights."""
        ...

    def size(self) -> Size:
        """What its layers' weights take."""
        ...

    def load(self) -> Actor:
        """Builds the actor."""
        ...


@dataclass(frozen=True)
class Rollout:
    """One run.

    control: `blind` shows a grey image, `wrong_instruction` names another task of the benchmark.
    videos: where films of failures go. make_env: an importable function, since worker processes need it too.
    """

    benchmark: str
    actor: ActorRecipe
    seed: int = 7
    control: Control = "none"
    videos: Path | None = None
    make_env: EnvFactory = make_env

    def settings(self) -> Settings:
        """Everything that decides an episode's outcome; a journal with other values is refused."""
        return {
            "benchmark": self.benchmark,
            "actor": self.actor.settings(),
            "seed": self.seed,
            "control": self.control,
        }


@dataclass(frozen=True)
class Job:
    """One episode to run."""

    task: str
    trial: int


def spoken_instruction(env: BenchmarkEnv, task: str, trial: int, control: Control) -> str:
    """The task's words or, for the control, another task's.

    Every trial takes the words of another task, beginning half the benchmark away: some wrong words ask for the right
    motion by chance, as to turn a faucet where a window's handle is to be pushed.
    """
    right = env.instruction(task)
    if control != "wrong_instruction":
        return right
    tasks = env.tasks
    start = tasks.index(task) + len(tasks) // 2
    around = [env.instruction(tasks[(start + offset) % len(tasks)]) for offset in range(len(tasks))]
    wrong = [words for words in around if words != right]
    if not wrong:
        raise DataError("wrong instruction: every task of the benchmark has the same words")
    return wrong[trial % len(wrong)]


def run_episode(env: BenchmarkEnv, actor: Actor, rollout: Rollout, job: Job) -> tuple[Episode, list[np.ndarray]]:
    """Plays one episode; also returns the frames that the policy saw, one per decision.

    An engine that cannot decide fails the episode, as it would stop the robot.
    """
    seen = env.reset(job.task, job.trial, rollout.seed)
    initial_state = env.initial_state()
    instruction = spoken_instruction(env, job.task, job.trial, rollout.control)
    frames: list[np.ndarray] = []
    spent_ns, success, engine_error = 0, False, ""
    while True:
        images = [np.full_like(image, 128) for image in seen.images] if rollout.control == "blind" else seen.images
        frames.append(images[0])
        started_ns = time.perf_counter_ns()
        try:
            decision = actor.act(Observation(images[0], instruction, seen.state, tuple(images[1:])))
        except EngineError as error:
            engine_error = str(error)
            break
        spent_ns += time.perf_counter_ns() - started_ns
        # As published chunks are evaluated: so many rows of one are carried out before the next look.
        for action in np.atleast_2d(decision.action)[: actor.config.executed]:
            result = env.step(action)
            if result.done:
                break
        if result.done:
            success = result.success
            break
        seen = result.observation
    latency_ms = round(spent_ns / 1e6 / len(frames), 3)
    return Episode(job.task, job.trial, success, len(frames), latency_ms, initial_state, engine_error), frames


class Worker:
    """A process's actor and env, built for the first job and kept for the rest."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self._actor = rollout.actor.load()
        self._env = rollout.make_env(rollout.benchmark, self._actor.config)

    def run(self, job: Job) -> Episode:
        """One episode; a failure leaves its film in the rollout's video folder, if there is one."""
        episode, frames = run_episode(self._env, self._actor, self._rollout, job)
        if self._rollout.videos is not None and not episode.success:
            write_video(self._rollout.videos / f"{job.task}_{job.trial:03d}.mp4", frames)
        return episode

    def close(self) -> None:
        self._env.close()


def run(rollout: Rollout, tasks: tuple[str, ...], trials: int, out: Path, workers: int = 1) -> RolloutResult:
    """Runs what the journal beside `out` does not hold yet, then writes the result to `out`.

    The journal makes the run resumable; more tasks or trials may be added later, any other change is refused.
    Raises DataError for unknown tasks, ArtefactError for a journal with other settings, and where something of another
    kind stands.
    """
    check_file(out, KIND)
    config = rollout.actor.config()
    tasks = tasks or rollout.make_env(rollout.benchmark, config).tasks
    _check(rollout, config, tasks, trials)
    if rollout.videos is not None:
        claim_folder(rollout.videos, _FILMS)
    journal = Journal(out.with_suffix(".episodes.jsonl"), rollout.settings())
    jobs = [Job(task, trial) for task in tasks for trial in range(trials)]
    open_jobs = [job for job in jobs if (job.task, job.trial) not in journal.episodes]
    done = [journal.episodes[job.task, job.trial] for job in jobs if (job.task, job.trial) in journal.episodes]
    successes = sum(episode.success for episode in done)
    with (
        tqdm(total=len(jobs), initial=len(done), unit="episode", smoothing=0.1, desc=out.stem) as bar,
        closing(_episodes(rollout, open_jobs, workers)) as episodes,
    ):
        for episode in episodes:
            journal.append(episode)
            successes += episode.success
            bar.set_postfix_str(f"{successes} succeeded", refresh=False)
            bar.update()
    result = RolloutResult(rollout.settings(), tuple(journal.episodes[job.task, job.trial] for job in jobs))
    result.write(out)
    return result


def _check(rollout: Rollout, config: PolicyConfig, tasks: tuple[str, ...], trials: int) -> None:
    if trials < 1:
        raise DataError(f"--trials must be at least 1, got {trials}")
    env = rollout.make_env(rollout.benchmark, config)
    for task in tasks:
        env.instruction(task)
    if rollout.control == "wrong_instruction" and len(env.tasks) < 2:
        raise DataError(f"benchmark {rollout.benchmark} has one task only, so no instruction is wrong")


def _episodes(rollout: Rollout, jobs: list[Job], workers: int) -> Generator[Episode, None, None]:
    if not jobs:
        return
    if workers <= 1:
        with closing(Worker(rollout)) as worker:
            yield from map(worker.run, jobs)
    else:
        yield from _parallel(rollout, jobs, min(workers, len(jobs)))


_worker: Worker | None = None


def _parallel(rollout: Rollout, jobs: list[Job], workers: int) -> Generator[Episode, None, None]:
    # A renderer's context does not survive a fork; a fresh interpreter per worker is slower to start but safe.
    context = multiprocessing.get_context("spawn")
    watched, lifeline = context.Pipe(duplex=False)
    # Leaving the block, for whatever reason, cuts the lifeline first: no worker finishes an episode nobody waits for.
    with ProcessPoolExecutor(workers, context, _start_worker, (rollout, watched)) as pool, lifeline:
        futures = [pool.submit(_run_job, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise VlaError(
                "a rollout worker ended unexpectedly (its message is above, or the machine ran out of memory); "
                "the same command continues where it stopped, with fewer --workers if memory was short"
            ) from error


def _start_worker(rollout: Rollout, watched: Connection) -> None:
    """Runs once in each worker: Ctrl-C is the parent's business, and a cut lifeline ends the process."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()
    _worker = Worker(rollout)


def _end_with_parent(watched: Connection) -> None:
    wait([watched])
    os._exit(1)


def _run_job(job: Job) -> Episode:
    if _worker is None:
        raise RuntimeError("worker was not started")
    return _worker.run(job)
