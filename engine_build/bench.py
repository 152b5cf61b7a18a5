"""Latency, memory and load time of an engine, always beside 16-bit engines in the same run.

Each engine runs in a process of its own, so that peak memory is its own, and they take turns decision by decision,
so that whatever else the machine does hits all alike. The first decisions of each are not counted.
"""

import multiprocessing
import os
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from engine_build.backends import runs_here
from vla_policy.core.bench import Bench, EngineFigures, Quantiles
from vla_policy.core.errors import ArtefactError, EngineError, VlaError
from vla_policy.core.files import sha256_file
from vla_policy.core.manifest import MANIFEST, Manifest
from vla_policy.core.observation import Observation
from vla_policy.core.processor import cpu_name
from vla_policy.core.runner import Timings, load_engine
from vla_policy.core.targets import Target

_KIB = 1024
_INSTRUCTION = "pick up the object and place it in the basket"


def bench(
    engine: Path,
    references: Sequence[Path],
    repeats: int,
    threads: int,
    warm_up: int = 2,
    unnorm_key: str | None = None,
) -> Bench:
    """Measures `engine` beside `references`, `repeats` decisions each, after `warm_up` ones that are not counted.

    Raises VlaError if one is unusable, or has no such statistics.
    """
    paths = (engine, *references)
    manifests = [Manifest.load(path) for path in paths]
    ours = manifests[0]
    key = ours.config.unnorm_key(unnorm_key)
    for reference, theirs in zip(references, manifests[1:], strict=True):
        if ours.parents["policy"] != theirs.parents["policy"]:
            raise ArtefactError(f"{reference}: built from another policy than {engine}; compare engines of one policy")
        if ours.target != theirs.target:
            raise ArtefactError(
                f"{reference}: for target {theirs.target}, {engine} is for {ours.target}; build it for both"
            )
    observation = _observation(ours, key)
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(path, key, threads)) for path in paths]
        timings: list[list[Timings]] = [[] for _ in workers]
        for turn in tqdm(range(warm_up + repeats), desc="deciding", unit="decision", disable=None):
            for worker, measured in zip(workers, timings, strict=True):
                lap = worker.decide(observation)
                if turn >= warm_up:
                    measured.append(lap)
        figures = [
            _figures(worker, path, manifest, measured)
            for worker, path, manifest, measured in zip(workers, paths, manifests, timings, strict=True)
        ]
    machine = f"{platform.machine()}, {cpu_name()}, {os.cpu_count()} cores"
    return Bench(figures[0], tuple(figures[1:]), threads, machine, ours.parents)


def report(result: Bench) -> str:
    """The figures side by side."""
    sides = (result.engine, *result.references)
    lines = [
        f"{'':24}" + "".join(f"{name:>18}" for name in (side.engine[-17:] for side in sides)),
        f"{'':24}" + "".join(f"{side.backend:>18}" for side in sides),
        f"{result.machine}, {result.threads} threads",
    ]
    for stage in result.engine.stages:
        for name in ("median_ms", "p90_ms", "p99_ms"):
            values = [getattr(side.stages[stage], name) for side in sides]
            lines.append(f"{stage + ' ' + name:24}" + "".join(f"{value:18.3f}" for value in values))
    for name in ("load_s", "average_bits"):
        lines.append(f"{name:24}" + "".join(f"{getattr(side, name):18.3f}" for side in sides))
    for name in ("disk_bytes", "idle_bytes", "peak_bytes"):
        lines.append(f"{name:24}" + "".join(f"{getattr(side, name):18,}" for side in sides))
    for reference in result.references:
        ratio = result.speedup_over(reference)
        lines.append(f"speed-up of a whole action, medians, over {reference.engine} ({reference.backend}): {ratio:.2f}")
    return "\n".join(lines)


def baselines_missing(result: Bench, target: Target) -> list[str]:
    """The target's 16-bit engines that were not measured and could be here: a line for each, with the command."""
    measured = {figures.backend for figures in result.references}
    lines = []
    for name in target.baselines:
        if name not in measured and runs_here(name):
            lines.append(
                f"note: {name} runs here, too, and may be the faster 16-bit engine; make one with `engine_build "
                f"build --uniform w16a16 --backend {name}` and name both with --against"
            )
    return lines


def _figures(worker: "_Worker", path: Path, manifest: Manifest, timings: Sequence[Timings]) -> EngineFigures:
    laps: dict[str, list[float]] = {"preprocess": [timing.preprocess_ms for timing in timings]}
    for timing in timings:
        for call, milliseconds in timing.calls:
            laps.setdefault(call, []).append(milliseconds)
    laps["action"] = [timing.total_ms for timing in timings]
    totals = manifest.totals()
    return EngineFigures(
        engine=path.resolve().name,
        backend=manifest.backend,
        sha256=sha256_file(path / MANIFEST),
        disk_bytes=totals["engine_bytes"],
        average_bits=totals["average_bits"],
        load_s=worker.load_s,
        idle_bytes=worker.idle_bytes,
        peak_bytes=worker.peak_bytes(),
        stages={name: Quantiles.of(values) for name, values in laps.items()},
    )


def _observation(manifest: Manifest, unnorm_key: str) -> Observation:
    """Random images: the arithmetic takes the same time for any."""
    config = manifest.config
    generator = np.random.default_rng(0)
    proprio = config.stats(unnorm_key).proprio
    shape = (config.num_images, config.image_size, config.image_size, 3)
    image, *further = generator.integers(0, 256, shape, dtype=np.uint8)
    state = np.asarray(proprio.low, np.float32) if proprio else None
    return Observation(image, _INSTRUCTION, state, tuple(further))


def peak_bytes() -> int:
    """Peak resident memory of this process. Linux: VmHWM, which unlike getrusage does not include the parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * _KIB


class _Worker:
    """A process with one engine in it."""

    def __init__(self, folder: Path, unnorm_key: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, folder, unnorm_key, threads)
        self._process: SpawnProcess = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.load_s, self.idle_bytes = self._receive()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def decide(self, observation: Observation) -> Timings:
        self._pipe.send(observation)
        timings: Timings = self._receive()
        return timings

    def peak_bytes(self) -> int:
        self._pipe.send(None)
        peak: int = self._receive()
        return peak

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError as error:
            raise ArtefactError("the process that ran the engine died; is there enough memory?") from error
        if isinstance(answer, VlaError):
            raise answer
        return answer


def _serve(pipe: Connection, folder: Path, unnorm_key: str, threads: int) -> None:
    """Answers each observation with its timings, and None with the peak memory; an error ends it."""
    idle_bytes = peak_bytes()
    started = time.perf_counter()
    try:
        engine = load_engine(folder, unnorm_key, threads)
        pipe.send((time.perf_counter() - started, idle_bytes))
        while True:
            observation = pipe.recv()
            pipe.send(peak_bytes() if observation is None else engine.decide(observation)[1])
    except EngineError as error:
        pipe.send(EngineError(f"{folder}: {error}"))
    except VlaError as error:
        pipe.send(error)
    except EOFError:
        return
