"""What the folder of a LeRobot data set says of itself: v3.0, v2.1 and v2.0, read without the lerobot package.

v3.0 keeps many episodes in one parquet file and one film per camera, and their places in `meta/episodes/*.parquet`;
v2 one file of each per episode, and their names by a pattern.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vla_policy.core.errors import DataError

INFO = Path("meta/info.json")
VERSIONS = ("v3.0", "v2.1", "v2.0")
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Feature:
    """One column. kind: image, video or a type of numbers; names: of its values, as far as the set tells."""

    kind: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    fps: float | None
    depth: bool

    @property
    def is_camera(self) -> bool:
        return self.kind in ("image", "video") and not self.depth


@dataclass(frozen=True)
class Film:
    """Where the frames of an episode are: a file below the set's folder, and when in it the episode starts."""

    file: str
    start_s: float


@dataclass(frozen=True)
class Episode:
    """One episode. data: its parquet file below the set's folder; films: by camera."""

    number: int
    length: int
    data: str
    films: Mapping[str, Film]

    @property
    def name(self) -> str:
        return f"episode_{self.number:06d}"


@dataclass(frozen=True)
class DataSet:
    """meta/info.json, checked."""

    root: Path
    version: str
    fps: float
    features: Mapping[str, Feature]
    data_path: str
    video_path: str | None
    chunk: int

    @staticmethod
    def load(root: Path) -> "DataSet":
        """Raises DataError for an unknown version, missing keys, and cameras of another rate than the set's."""
        path = root / INFO
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); copy it again") from error
        if not isinstance(raw, dict):
            raise DataError(f"{path}: expected a JSON object, got {type(raw).__name__}")
        version = raw.get("codebase_version")
        if version not in VERSIONS:
            raise DataError(
                f"{path}: codebase_version {version!r} is unknown; known are {', '.join(VERSIONS)}: convert the set "
                "with lerobot's own script"
            )
        try:
            found = DataSet(
                root=root,
                version=version,
                fps=float(raw["fps"]),
                features={name: _feature(value) for name, value in raw["features"].items()},
                data_path=raw["data_path"],
                video_path=raw.get("video_path"),
                chunk=int(raw.get("chunks_size") or 1000),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: {error} is missing or malformed; copy it again") from error
        for name, feature in found.features.items():
            if feature.fps is not None and abs(feature.fps - found.fps) > 1e-3:
                raise DataError(
                    f"{path}: {name} has {feature.fps:g} frames per second, the set {found.fps:g}; its frames and "
                    "states are not of the same times: record or convert the set again"
                )
        return found

    def episodes(self, cameras: Sequence[str]) -> Iterator[Episode]:
        """Every episode, with the places of these cameras' films. Raises DataError for metadata that cannot be read."""
        films = [name for name in cameras if self.features[name].kind == "video"]
        if films and not self.video_path:
            raise DataError(f"{self.root / INFO}: {films[0]} is a video, but there is no video_path; copy it again")
        try:
            yield from (self._placed(films) if self.version == "v3.0" else self._numbered(films))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.root}/meta: episodes: {error} is missing or malformed; copy it again") from error

    def tasks(self) -> dict[int, str]:
        """The task in words by its number. Raises DataError where they cannot be read."""
        if self.version != "v3.0":
            rows = _lines(self.root / "meta/tasks.jsonl")
            return {int(row["task_index"]): str(row["task"]) for row in rows}
        path = self.root / "meta/tasks.parquet"
        with parquet(path) as file:
            table = file.read()
        # pandas' index of the table is the text; a writer without pandas may call the column so.
        texts = next((name for name in ("__index_level_0__", "task", "tasks") if name in table.column_names), None)
        if texts is None or "task_index" not in table.column_names:
            raise DataError(f"{path}: no column of texts beside task_index; it holds {', '.join(table.column_names)}")
        return dict(zip(table["task_index"].to_pylist(), table[texts].to_pylist(), strict=True))

    def _placed(self, films: Sequence[str]) -> Iterator[Episode]:
        files = sorted((self.root / "meta/episodes").glob("*/*.parquet"))
        if not files:
            raise DataError(f"{self.root}/meta/episodes: no parquet file; copy the set again")
        wanted = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for name in films:
            wanted += [f"videos/{name}/{key}" for key in ("chunk_index", "file_index", "from_timestamp")]
        for path in files:
            with parquet(path) as file:
                _check_columns(path, file, wanted)
                for row in file.read(columns=wanted).to_pylist():
                    yield Episode(
                        number=row["episode_index"],
                        length=row["length"],
                        data=self.data_path.format(
                            chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
                        ),
                        films={name: self._film(name, row) for name in films},
                    )

    def _film(self, name: str, row: Mapping[str, Any]) -> Film:
        assert self.video_path is not None  # `episodes`
        chunk, file = row[f"videos/{name}/chunk_index"], row[f"videos/{name}/file_index"]
        path = self.video_path.format(video_key=name, chunk_index=chunk, file_index=file)
        return Film(path, row[f"videos/{name}/from_timestamp"])

    def _numbered(self, films: Sequence[str]) -> Iterator[Episode]:
        for row in _lines(self.root / "meta/episodes.jsonl"):
            number = int(row["episode_index"])
            place = {"episode_index": number, "episode_chunk": number // self.chunk}
            paths = {name: str(self.video_path).format(video_key=name, **place) for name in films}
            yield Episode(
                number=number,
                length=int(row["length"]),
                data=self.data_path.format(**place),
                films={name: Film(path, 0.0) for name, path in paths.items()},
            )


@contextmanager
def parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """The open file. Raises DataError where it is missing, truncated or none, also while it is being read."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: {unreadable(path, error)}") from error


def unreadable(path: Path, error: Exception) -> str:
    """Why a file of a data set cannot be read, and the remedy."""
    if not path.exists():
        return "is missing; the set was not copied whole"
    with path.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            return "is a Git LFS pointer, not the file; fetch it with `git lfs pull`"
    return f"is truncated or damaged ({error}); copy it again"


def _check_columns(path: Path, file: pq.ParquetFile, wanted: Sequence[str]) -> None:
    held = file.schema_arrow.names
    for name in wanted:
        if name not in held:
            columns = ", ".join(held[:12]) + (", ..." if len(held) > 12 else "")
            raise DataError(f"{path}: no column {name!r}; it holds {columns}")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy it again") from error


def _feature(raw: Mapping[str, Any]) -> Feature:
    info = raw.get("info") or raw.get("video_info") or {}
    names = raw.get("names") or ()
    if isinstance(names, Mapping):  # such as {"motors": [...]}
        names = [name for value in names.values() for name in (value if isinstance(value, list) else [value])]
    fps = info.get("video.fps", raw.get("fps"))
    return Feature(
        kind=raw["dtype"],
        shape=tuple(raw["shape"]),
        names=tuple(map(str, names)),
        fps=None if fps is None else float(fps),
        depth=bool(info.get("video.is_depth_map")),
    )
