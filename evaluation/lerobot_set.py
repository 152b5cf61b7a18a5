"""Writing a LeRobot data set (v3.0) without the lerobot package: one parquet table, its images as PNG, and the metadata
that lerobot's own reader asks for."""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vla_policy.core.errors import DataError
from vla_policy.core.outputs import FolderKind, atomic_folder

LEROBOT = FolderKind("lerobot", "meta/vla_deploy.json", ("meta/*", "meta/episodes/*/*", "data/*/*"))
_DATA, _EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
_ROWS = 64
"""Rows of images that are held before they are written."""
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_KEYS = {
    "timestamp": ("float32", pa.float32()),
    "frame_index": ("int64", pa.int64()),
    "episode_index": ("int64", pa.int64()),
    "index": ("int64", pa.int64()),
    "task_index": ("int64", pa.int64()),
}


@dataclass(frozen=True)
class SetRow:
    """One frame. episode: any number that tells episodes apart, consecutive rows of one belong together."""

    episode: int
    task: str
    images: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]


@dataclass
class _Episodes:
    """What the metadata tell of the episodes so far."""

    tasks: dict[str, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    spoken: list[list[str]] = field(default_factory=list)
    last: int | None = None


def write_set(
    out: Path,
    rows: Iterable[SetRow],
    fps: int,
    names: dict[str, Sequence[str]],
    robot: str,
    about: dict[str, Any],
) -> int:
    """Writes the data set `out`, whole or not at all; returns its number of frames.

    fps: nominal, LeRobot's clock is the frame's number divided by it. names: of the values of every vector. about: what
    else belongs to the set, as JSON. Raises DataError for rows that do not fit each other, or none.
    """
    episodes = _Episodes()
    shapes: dict[str, tuple[int, ...]] = {}
    with atomic_folder(out, LEROBOT) as folder:
        for path in (_DATA, _EPISODES):
            (folder / path).parent.mkdir(parents=True)
        writer: pq.ParquetWriter | None = None
        columns: dict[str, list[Any]] = {}
        total = 0
        for row in rows:
            shapes = shapes or {name: image.shape for name, image in row.images.items()}
            _check(row, shapes, names)
            cells = _cells(row, episodes, total, fps)
            for name, value in cells.items():
                columns.setdefault(name, []).append(value)
            total += 1
            if total % _ROWS == 0:
                writer = _flush(folder / _DATA, writer, columns, names, shapes)
        if total == 0:
            raise DataError(f"{out}: no frame to write")
        if columns:
            writer = _flush(folder / _DATA, writer, columns, names, shapes)
        assert writer is not None  # there are rows
        writer.close()
        _write_metadata(folder, episodes, total, fps, names, shapes, robot)
        (folder / LEROBOT.index).write_text(json.dumps({"kind": LEROBOT.name, "schema_version": 1} | about, indent=1))
    return total


def _check(row: SetRow, shapes: dict[str, tuple[int, ...]], names: dict[str, Sequence[str]]) -> None:
    for name, image in row.images.items():
        if image.shape != shapes.get(name):
            raise DataError(f"{name}: an image of {list(image.shape)} after {shapes.get(name)}; a set has one size")
    for name, values in row.vectors.items():
        if len(values) != len(names[name]):
            raise DataError(f"{name}: {len(values)} values for the names {', '.join(names[name])}")


def _cells(row: SetRow, episodes: _Episodes, index: int, fps: int) -> dict[str, Any]:
    """The row's cells; takes it into account in `episodes`."""
    if row.episode != episodes.last:
        episodes.last = row.episode
        episodes.lengths.append(0)
        episodes.spoken.append([])
    step = episodes.lengths[-1]
    episodes.lengths[-1] += 1
    task = episodes.tasks.setdefault(row.task, len(episodes.tasks))
    if row.task not in episodes.spoken[-1]:
        episodes.spoken[-1].append(row.task)
    pictures = {name: {"bytes": png(image), "path": f"frame-{step:06d}.png"} for name, image in row.images.items()}
    # A feature of one value is a column of numbers, as lerobot writes it, not of lists.
    vectors = {name: np.asarray(values, np.float32) for name, values in row.vectors.items()}
    vectors = {name: values[0] if len(values) == 1 else values for name, values in vectors.items()}
    keys = (step / fps, step, len(episodes.lengths) - 1, index, task)
    return {**pictures, **vectors, **dict(zip(_KEYS, keys, strict=True))}


def png(image: np.ndarray) -> bytes:
    """uint8 RGB [H, W, 3] without loss."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _flush(
    path: Path,
    writer: pq.ParquetWriter | None,
    columns: dict[str, list[Any]],
    names: dict[str, Sequence[str]],
    shapes: dict[str, tuple[int, ...]],
) -> pq.ParquetWriter:
    """Writes the collected columns as one group of rows, and forgets them."""
    types: dict[str, pa.DataType] = {name: _IMAGE for name in shapes}
    numbers = {name: pa.list_(pa.float32(), len(of)) if len(of) > 1 else pa.float32() for name, of in names.items()}
    types |= {name: numbers[name] for name in names if name in columns}
    types |= {name: kind for name, (_, kind) in _KEYS.items()}
    schema = pa.schema([(name, types[name]) for name in columns])
    writer = writer or pq.ParquetWriter(path, schema)
    writer.write_table(pa.table({name: pa.array(values, types[name]) for name, values in columns.items()}, schema))
    columns.clear()
    return writer


def _write_metadata(
    folder: Path,
    episodes: _Episodes,
    total: int,
    fps: int,
    names: dict[str, Sequence[str]],
    shapes: dict[str, tuple[int, ...]],
    robot: str,
) -> None:
    features: dict[str, Any] = {
        name: {"dtype": "image", "shape": list(shape), "names": ["height", "width", "channels"]}
        for name, shape in shapes.items()
    }
    features |= {name: {"dtype": "float32", "shape": [len(of)], "names": list(of)} for name, of in names.items()}
    features |= {name: {"dtype": kind, "shape": [1], "names": None} for name, (kind, _) in _KEYS.items()}
    info = {
        "codebase_version": "v3.0",
        "robot_type": robot,
        "total_episodes": len(episodes.lengths),
        "total_frames": total,
        "total_tasks": len(episodes.tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{len(episodes.lengths)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "features": features,
    }
    (folder / "meta/info.json").write_text(json.dumps(info, indent=1))
    ends = np.cumsum(episodes.lengths)
    count = len(ends)
    table = {
        "episode_index": np.arange(count),
        "tasks": episodes.spoken,
        "length": episodes.lengths,
        "data/chunk_index": np.zeros(count, np.int64),
        "data/file_index": np.zeros(count, np.int64),
        "dataset_from_index": ends - episodes.lengths,
        "dataset_to_index": ends,
        "meta/episodes/chunk_index": np.zeros(count, np.int64),
        "meta/episodes/file_index": np.zeros(count, np.int64),
    }
    pq.write_table(pa.table(table), folder / _EPISODES)
    pq.write_table(_tasks(episodes.tasks), folder / "meta/tasks.parquet")


def _tasks(tasks: dict[str, int]) -> pa.Table:
    """The table whose index, to pandas, is the text."""
    index = "__index_level_0__"
    columns = [
        {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, field, kind, numpy in (
            ("task_index", "task_index", "int64", "int64"),
            (None, index, "unicode", "object"),
        )
    ]
    about = {"index_columns": [index], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), index: pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(about)})
