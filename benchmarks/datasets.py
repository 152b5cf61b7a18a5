"""How fast a LeRobot set of the size of lerobot/libero is indexed and states are chosen from it, and in what memory.

    python benchmarks/datasets.py --out FOLDER

Makes sets of 1,693 episodes (273,000 frames) and of a tenth of that, as v3.0 (few large files) and v2.1 (files per
episode), two cameras of 256x256 pixels in H.264, whose films are copies of one. Each row has a process of its
own; memory is its peak, less that of one that only imported the same modules.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calibrator.data.calibration import collect
from calibrator.data.layout import PRESETS
from calibrator.data.lerobot import LeRobotSource
from vla_policy.core.cli import run

EPISODES, MEAN_LENGTH, FPS, SIZE = 1693, 161, 10, 256
CAMERAS = ("observation.images.image", "observation.images.image2")
EPISODES_PER_FILM = 25


@dataclass(frozen=True)
class Measured:
    """One row: seconds, and the process's peak of memory in MB."""

    index_s: float
    collect_s: float
    peak_mb: float


def lengths(count: int) -> list[int]:
    """Frames of every episode, reproducible."""
    return np.random.default_rng(0).integers(MEAN_LENGTH - 60, MEAN_LENGTH + 61, count).tolist()


def film(path: Path, frames: int) -> None:
    """A moving gradient with some noise, in H.264 with a key frame every other frame as lerobot writes it."""
    rows = np.arange(SIZE, dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 32, (SIZE, SIZE, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", FPS, options={"preset": "ultrafast", "crf": "30", "g": "2"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            image = np.roll(rows, number)[:, None, None] // 2 + noise
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())


def info(version: str, episodes: int, frames: int) -> dict[str, object]:
    image = {"dtype": "video", "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channels"]}
    keys = {name: {"dtype": "int64", "shape": [1], "names": None} for name in ("frame_index", "episode_index", "index")}
    v3 = version == "v3.0"
    return {
        "codebase_version": version,
        "fps": FPS,
        "total_episodes": episodes,
        "total_frames": frames,
        "chunks_size": 1000,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        if v3
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if v3
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            **dict.fromkeys(CAMERAS, image),
            "observation.state": {"dtype": "float32", "shape": [8], "names": ["state"]},
            "action": {"dtype": "float32", "shape": [7], "names": ["actions"]},
            "timestamp": {"dtype": "float32", "shape": [1], "names": None},
            "task_index": {"dtype": "int64", "shape": [1], "names": None},
            **keys,
        },
    }


def rows(number: int, length: int) -> pa.Table:
    """One episode's part of the table."""
    generator, steps = np.random.default_rng(number), np.arange(length)
    lists = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(generator.normal(size=length * n).astype(np.float32)), n)
        for name, n in (("observation.state", 8), ("action", 7))
    }
    keys = {"frame_index": steps, "episode_index": np.full(length, number), "task_index": np.full(length, number % 40)}
    return pa.table({**lists, "timestamp": pa.array((steps / FPS).astype(np.float32)), **keys})


def make(root: Path, version: str, count: int) -> None:
    """A set of `count` episodes, unless it is there."""
    if (root / "meta/info.json").is_file():
        return
    shutil.rmtree(root, ignore_errors=True)
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    of, tasks = lengths(count), [f"task {number}" for number in range(40)]
    pattern = root.parent / "film.mp4"
    if not pattern.is_file():
        film(pattern, EPISODES_PER_FILM * (MEAN_LENGTH + 61))
    layout = info(version, count, sum(of))
    if version == "v3.0":
        pq.write_table(pa.table({"task_index": range(40), "__index_level_0__": tasks}), root / "meta/tasks.parquet")
        pq.write_table(pa.Table.from_pylist(list(places(of))), root / "meta/episodes/chunk-000/file-000.parquet")
        (root / "data/chunk-000").mkdir(parents=True)
        first = rows(0, of[0])
        with pq.ParquetWriter(root / "data/chunk-000/file-000.parquet", first.schema) as writer:
            for number, length in enumerate(of):
                writer.write_table(rows(number, length))
        films = {f"videos/{c}/chunk-000/file-{n // EPISODES_PER_FILM:03d}.mp4" for c in CAMERAS for n in range(count)}
    else:
        lines = [{"episode_index": n, "tasks": [tasks[n % 40]], "length": length} for n, length in enumerate(of)]
        (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
        said = [{"task_index": number, "task": task} for number, task in enumerate(tasks)]
        (root / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, said)))
        for number, length in enumerate(of):
            path = root / str(layout["data_path"]).format(episode_chunk=number // 1000, episode_index=number)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(rows(number, length), path)
        name = str(layout["video_path"])
        films = {
            name.format(video_key=camera, episode_chunk=number // 1000, episode_index=number)
            for camera in CAMERAS
            for number in range(count)
        }
    for file in films:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        os.link(pattern, root / file)
    (root / "meta/info.json").write_text(json.dumps(layout))


def places(of: Sequence[int]) -> Iterator[dict[str, object]]:
    """meta/episodes of v3.0."""
    for number, length in enumerate(of):
        group = number // EPISODES_PER_FILM
        start = sum(of[group * EPISODES_PER_FILM : number]) / FPS
        row: dict[str, object] = {"episode_index": number, "length": length}
        row |= {"data/chunk_index": 0, "data/file_index": 0}
        for camera in CAMERAS:
            row |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": group}
            row |= {f"videos/{camera}/from_timestamp": start}
        yield row


def measure(root: Path | None, states: int, out: Path) -> Measured:
    """Times of indexing alone, and of choosing, reading and writing a calibration set; without a set none."""
    started = time.perf_counter()
    index_s = collect_s = 0.0
    if root is not None:
        layout = PRESETS["lerobot/libero"]
        LeRobotSource(root, layout).index()
        index_s = time.perf_counter() - started
        shutil.rmtree(out, ignore_errors=True)
        collect([LeRobotSource(root, layout)], out, states, seed=0)
        collect_s = time.perf_counter() - started - index_s
    return Measured(index_s, collect_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the sets (about 200 MB)"
    )
    parser.add_argument("--states", type=int, nargs="+", default=[32, 512], help="states of a calibration set")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"{'set':8} {'frames':>8} {'states':>7} {'index s':>8} {'collect s':>10} {'peak MB':>8}")
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        nothing = pool.submit(measure, None, 0, arguments.out).result().peak_mb
        for version in ("v3.0", "v2.1"):
            for count in (EPISODES // 10, EPISODES):
                root = arguments.out / f"{version}_{count}"
                make(root, version, count)
                for states in arguments.states:
                    row = pool.submit(measure, root, states, arguments.out / "calibration").result()
                    frames, peak = sum(lengths(count)), row.peak_mb - nothing
                    print(f"{version:8} {frames:8} {states:7} {row.index_s:8.1f} {row.collect_s:10.1f} {peak:8.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
