"""LeRobot data sets as calibration states: the tables are read column by column, pictures where a state was chosen."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from calibrator.data.layout import Held, RecordLayout
from calibrator.data.lerobot_format import INFO, DataSet, Episode, Film, parquet
from calibrator.data.records import Record, SourceIndex, Trajectory
from calibrator.data.signature import signature
from calibrator.data.video import frames_at
from vla_policy.core.errors import DataError
from vla_policy.core.instruction import normalised
from vla_policy.core.left_out import Tally
from vla_policy.core.observation import Observation
from vla_policy.core.ros_image import CompressedImage

_EPISODE, _STEP, _TIME, _TASK = "episode_index", "frame_index", "timestamp", "task_index"
_KEYS = (_EPISODE, _STEP, _TIME, _TASK)
_ROWS, _PICTURES = 8192, 16
"""Rows that are held at a time: of numbers, and of images."""


def is_lerobot(path: Path) -> bool:
    """Whether `path` is the folder of a LeRobot data set."""
    return (path / INFO).is_file()


@dataclass(frozen=True)
class _Place:
    """Where an episode's rows are: from `row` of its file on."""

    episode: Episode
    row: int


@dataclass
class _Seen:
    """What the rows of an episode told so far. row: its first of the file; strange: steps that cannot be used."""

    episode: Episode
    row: int | None = None
    rows: int = 0
    strange: set[int] = field(default_factory=set)
    broken: bool = False


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of a file: their keys, int64 [R] and float [R], and the numbers float64 [R, n] by feature."""

    first: int
    keys: Mapping[str, np.ndarray]
    vectors: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.keys[_EPISODE])


class LeRobotSource:
    """The folder of a LeRobot data set (v3.0, v2.1, v2.0)."""

    def __init__(self, path: Path, layout: RecordLayout) -> None:
        self.path = str(path)
        self._set = DataSet.load(path)
        features = self._set.features
        cameras = tuple(name for name, feature in features.items() if feature.is_camera)
        vectors = [name for name, feature in features.items() if feature.kind.startswith(("float", "int", "uint"))]
        vectors = [name for name in vectors if name not in (*_KEYS, "index")]
        held = Held(
            cameras=cameras,
            vectors=vectors,
            texts=[name for name, feature in features.items() if feature.kind == "string"],
            state=("observation.state",) if "observation.state" in vectors else (),
            action="action" if "action" in vectors else None,
            rotation=(0,),  # policies are trained on the images as the set stores them
        )
        self.layout = layout.settled(self.path, held)
        if self.layout.task:
            raise DataError(f"{self.path}: a LeRobot set keeps its tasks in meta/tasks; leave out --task")
        self._vectors = [part.feature for part in self.layout.parts]
        self._vectors += [self.layout.action] if self.layout.action else []
        self._tasks = {number: normalised(text) for number, text in self._set.tasks().items()}
        self._places: dict[str, _Place] = {}

    def index(self) -> SourceIndex:
        """Every episode, by the columns of numbers; no picture is decoded."""
        tally, found = Tally(), []
        episodes = sorted(self._set.episodes(self.layout.cameras), key=lambda one: (one.data, one.number))
        bar = tqdm(total=len(episodes), desc=f"index {Path(self.path).name}", unit="episode", disable=None)
        for file, group in groupby(episodes, key=lambda one: one.data):
            wanted = {one.number: one for one in group}
            bar.update(len(wanted))
            try:
                found += self._in_file(file, wanted, tally)
            except DataError as error:
                tally.add(file, "cannot be read", str(error), len(wanted))
        bar.close()
        return SourceIndex(tuple(sorted(found, key=lambda one: one.name)), tally.found)

    def _in_file(self, file: str, wanted: Mapping[int, Episode], tally: Tally) -> list[Trajectory]:
        """The usable trajectories of one parquet file, whose rows are seen once, a few thousand at a time."""
        seen = {number: _Seen(episode) for number, episode in wanted.items()}
        for part in self._scan(file):
            for number, at in _runs(part):
                if number in seen:
                    self._see(seen[number], part, at, tally)
        return [one for each in seen.values() if (one := self._usable(each, tally))]

    def _see(self, seen: _Seen, part: _Rows, at: slice, tally: Tally) -> None:
        """Takes in consecutive rows of one episode."""
        name, file, first = seen.episode.name, seen.episode.data, part.first + at.start
        seen.row = first if seen.row is None else seen.row
        steps, times = part.keys[_STEP][at], part.keys[_TIME][at]
        if not np.array_equal(steps, seen.rows + np.arange(len(steps))) or first != seen.row + seen.rows:
            seen.broken = True
            tally.add(file, "rows are not in order", name)
        elif np.abs(times - steps / self._set.fps).max() > 0.5 / self._set.fps:
            seen.broken = True
            tally.add(file, f"timestamps are not {self._set.fps:g} per second", name)
        untold = set(part.keys[_TASK][at].tolist()) - set(self._tasks)
        if untold and not self.layout.instruction:
            seen.broken = True
            tally.add(file, "no task in words", f"{name}: task_index {min(untold)}; give it with --instruction")
        seen.rows += len(steps)
        for feature, values in part.vectors.items():
            strange = steps[~np.isfinite(values[at]).all(1)].tolist()
            if strange:
                tally.add(feature, "not finite", f"{name} step {strange[0]}", len(strange))
                seen.strange.update(strange)

    def _usable(self, seen: _Seen, tally: Tally) -> Trajectory | None:
        episode = seen.episode
        if seen.broken or seen.row is None or seen.rows != episode.length:
            if not seen.broken:
                text = f"{episode.name}: meta says {episode.length} rows, the file holds {seen.rows}"
                tally.add(episode.data, "different lengths", text)
            return None
        for film in episode.films.values():
            if not (Path(self.path) / film.file).is_file():
                tally.add(film.file, "missing video", f"{episode.name}; the set was not copied whole")
                return None
        whole = range(episode.length)
        steps = tuple(step for step in whole if step not in seen.strange) if seen.strange else whole
        if not steps:
            return None
        self._places[episode.name] = _Place(episode, seen.row)
        return Trajectory(episode.name, episode.length, steps)

    def _scan(self, file: str) -> Iterator[_Rows]:
        with parquet(Path(self.path) / file) as opened:
            self._check_columns(opened, file)
            first = 0
            for batch in opened.iter_batches(batch_size=_ROWS, columns=[*_KEYS, *self._vectors]):
                yield self._numbers(batch, first)
                first += len(batch)

    def _check_columns(self, opened: pq.ParquetFile, file: str) -> None:
        held = opened.schema_arrow.names
        pictures = [name for name in self.layout.cameras if self._set.features[name].kind == "image"]
        for name in (*_KEYS, *self._vectors, *pictures):
            if name not in held:
                raise DataError(f"{file}: no column {name!r}, which meta/info.json names; it holds {', '.join(held)}")

    def _numbers(self, batch: pa.RecordBatch, first: int) -> _Rows:
        keys = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in _KEYS}
        return _Rows(first, keys, {name: _matrix(batch.column(name), name) for name in self._vectors})

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[Record]:
        chosen = [(self._places[name], step) for name, steps in wanted.items() for step in sorted(steps)]
        chosen.sort(key=lambda one: (one[0].episode.data, one[0].row + one[1]))
        for file, group in groupby(chosen, key=lambda one: one[0].episode.data):
            yield from self._records(file, list(group))

    def _records(self, file: str, chosen: list[tuple[_Place, int]]) -> Iterator[Record]:
        films = [self._film_frames(camera, chosen) for camera in self.layout.cameras]
        columns = [name for name in self.layout.cameras if self._set.features[name].kind == "image"]
        rows = [place.row + step for place, step in chosen]
        with parquet(Path(self.path) / file) as opened:
            batches = _rows_at(opened, rows, [*_KEYS, *self._vectors, *columns], _PICTURES if columns else _ROWS)
            for (place, step), batch in zip(chosen, batches, strict=True):
                numbers = self._numbers(batch, 0)
                images = []
                for camera, (name, frames) in enumerate(zip(self.layout.cameras, films, strict=True)):
                    stored = self._picture(batch.column(name)[0]) if frames is None else next(frames)
                    images.append(self.layout.view(stored, camera))
                yield self._record(place.episode, step, images, numbers)

    def _record(self, episode: Episode, step: int, images: list[np.ndarray], numbers: _Rows) -> Record:
        names = {name: feature.names for name, feature in self._set.features.items()}
        state = self.layout.joined(numbers.vectors, names)
        action = numbers.vectors[self.layout.action][0].astype(np.float32) if self.layout.action else None
        task = self._tasks.get(int(numbers.keys[_TASK][0]), "") or self.layout.instruction
        observation = Observation(images[0], task, state, tuple(images[1:]))
        return Record(episode.name, step, observation, action)

    def _film_frames(self, camera: str, chosen: list[tuple[_Place, int]]) -> Iterator[np.ndarray] | None:
        """The frames of a camera in the order of `chosen`; None where the table holds its images."""
        if self._set.features[camera].kind == "image":
            return None
        return self._decoded([(place.episode.films[camera], step / self._set.fps) for place, step in chosen])

    def _decoded(self, places: list[tuple[Film, float]]) -> Iterator[np.ndarray]:
        for file, group in groupby(places, key=lambda one: one[0].file):
            times = [film.start_s + time_s for film, time_s in group]
            yield from frames_at(Path(self.path) / file, times, 0.25 / self._set.fps)

    def _picture(self, cell: pa.Scalar) -> np.ndarray:
        value = cell.as_py() or {}
        data = value.get("bytes")
        if data is None and value.get("path"):
            try:
                data = (Path(self.path) / value["path"]).read_bytes()
            except OSError as error:
                raise DataError(f"{self.path}: image {value['path']} cannot be read ({error.strerror})") from error
        return CompressedImage("", memoryview(data or b"")).decode()

    def describe(self) -> dict[str, Any]:
        root = Path(self.path)
        files = [place.episode.data for place in self._places.values()]
        files += [film.file for place in self._places.values() for film in place.episode.films.values()]
        return {
            "kind": "lerobot",
            "path": root.resolve().name,
            "version": self._set.version,
            "sha256": signature(root, sorted((root / "meta").rglob("*.*")), {root / file for file in files}),
            "layout": self.layout.to_json(),
        }


def _matrix(column: pa.Array, name: str) -> np.ndarray:
    """float64 [R, n] of a column of numbers or of lists that are equally long. Raises DataError for others."""
    values = column.flatten() if pa.types.is_nested(column.type) else column
    if column.null_count or len(values) % max(len(column), 1):
        raise DataError(f"{name}: rows without a value, or of different lengths")
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float64).reshape(len(column), -1)


def _runs(rows: _Rows) -> Iterator[tuple[int, slice]]:
    """(episode, where) of every run of one episode's rows."""
    numbers = rows.keys[_EPISODE]
    starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    for start, end in pairwise(starts):
        if end > start:
            yield int(numbers[start]), slice(start, end)


def _rows_at(file: pq.ParquetFile, rows: Iterable[int], columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
    """One row each, of ascending `rows`; of the groups that hold none nothing is read."""
    ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
    for group, members in groupby(rows, key=lambda row: int(np.searchsorted(ends, row, side="right"))):
        first = int(ends[group - 1]) if group else 0
        batches = file.iter_batches(batch_size=size, row_groups=[group], columns=list(columns))
        batch = next(batches)
        for row in members:
            while row >= first + len(batch):
                first += len(batch)
                batch = next(batches)
            yield batch.slice(row - first, 1)
