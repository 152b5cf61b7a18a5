"""RLDS data sets on disk as TensorFlow Datasets writes them, read without TensorFlow: one episode per TFRecord."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from calibrator.data.layout import Held, RecordLayout
from calibrator.data.records import Record, SourceIndex, Trajectory
from calibrator.data.signature import signature
from calibrator.data.tfrecord import Shard, Values, open_shard
from vla_policy.core.errors import DataError
from vla_policy.core.instruction import normalised
from vla_policy.core.left_out import Tally
from vla_policy.core.observation import Observation
from vla_policy.core.ros_image import CompressedImage

_FEATURES, _INFO, _STEPS = "features.json", "dataset_info.json", "steps"
_TASKS = ("language_instruction", "observation/natural_language_instruction")
"""What the published sets call the task."""


def rlds_folders(path: Path) -> list[Path]:
    """The folders of data sets in `path`: itself, its versions, or those of the sets that lie in it."""
    for pattern in (_FEATURES, f"*/{_FEATURES}", f"*/*/{_FEATURES}"):
        if found := sorted(item.parent for item in path.glob(pattern)):
            return found
    return []


@dataclass(frozen=True)
class _Features:
    """What a step holds, by names without "steps/": sizes of numbers, images, texts."""

    vectors: Mapping[str, int]
    images: tuple[str, ...]
    texts: tuple[str, ...]

    @staticmethod
    def load(path: Path) -> "_Features":
        """Raises DataError for what is no set of episodes."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            steps = raw["featuresDict"]["features"][_STEPS]["sequence"]["feature"]["featuresDict"]["features"]
            leaves = dict(_leaves(steps, ""))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: no episodes of steps ({error}); expected an RLDS data set") from error
        return _Features(
            vectors={name: leaf["size"] for name, leaf in leaves.items() if leaf["kind"] == "vector"},
            images=tuple(name for name, leaf in leaves.items() if leaf["kind"] == "image"),
            texts=tuple(name for name, leaf in leaves.items() if leaf["kind"] == "text"),
        )


def _leaves(features: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, feature in features.items():
        if "featuresDict" in feature:
            yield from _leaves(feature["featuresDict"]["features"], f"{prefix}{name}/")
        elif "image" in feature:
            yield f"{prefix}{name}", {"kind": "image"}
        elif "text" in feature or feature.get("tensor", {}).get("dtype") in ("string", "object"):
            yield f"{prefix}{name}", {"kind": "text"}
        elif feature.get("tensor", {}).get("encoding", "none") in ("none", "NONE") and "tensor" in feature:
            size = 1
            for side in feature["tensor"].get("shape", {}).get("dimensions", ()):
                size *= int(side)
            yield f"{prefix}{name}", {"kind": "vector", "size": size}


@dataclass(frozen=True)
class _Place:
    """Where an episode's record is."""

    file: Path
    offset: int


class RldsSource:
    """One RLDS data set: a folder with features.json, dataset_info.json and TFRecord shards."""

    def __init__(self, path: Path, layout: RecordLayout) -> None:
        self.path = str(path)
        self._root = path
        self._features = _Features.load(path / _FEATURES)
        self._files, self._missing = _shards(path)
        features = self._features
        held = Held(
            cameras=features.images,
            vectors=tuple(features.vectors),
            texts=features.texts,
            state=("observation/state",) if "observation/state" in features.vectors else (),
            action="action" if "action" in features.vectors else None,
            rotation=(0,),  # policies are trained on the images as the set stores them
        )
        self.layout = layout.settled(self.path, held)
        self._task = self.layout.task or next((name for name in _TASKS if name in features.texts), None)
        if self._task is None and not self.layout.instruction:
            raise DataError(
                f"{path}: no text that is known as the task; name it with --task (it holds "
                f"{', '.join(features.texts) or 'none'}), or give the task itself with --instruction"
            )
        self._places: dict[str, _Place] = {}

    def index(self) -> SourceIndex:
        """Every record's numbers; pictures are stepped over."""
        tally, found = Tally(), []
        if self._missing:
            tally.add(self._root.name, "shards are missing", self._missing)
        for file in tqdm(self._files, desc=f"index {self._root.parent.name}", unit="shard", disable=None):
            try:
                shard = open_shard(file)
                for number, offset in enumerate(shard.offsets()):
                    name = f"{file.name}/{number:05d}"
                    if trajectory := self._trajectory(name, shard, offset, tally):
                        self._places[name] = _Place(file, offset)
                        found.append(trajectory)
            except DataError as error:
                tally.add(file.name, "cannot be read", str(error))
        return SourceIndex(tuple(found), tally.found)

    def _trajectory(self, name: str, shard: Shard, offset: int, tally: Tally) -> Trajectory | None:
        example = shard.example(offset)
        absent = [one for one in self._wanted if f"{_STEPS}/{one}" not in example]
        if absent:
            tally.add(absent[0], "missing", f"{name}, although {_FEATURES} names it")
            return None
        numbers = {one: self._numbers(example, one) for one in self._wanted if one in self._features.vectors}
        length = len(example[f"{_STEPS}/{self._counted}"])
        usable = np.ones(length, bool)
        for one, values in numbers.items():
            if len(values) != length:
                tally.add(one, "different lengths", f"{name}: {len(values)} of {length} steps")
                return None
            finite = np.isfinite(values).all(1)
            if not finite.all():
                tally.add(one, "not finite", f"{name} step {int(np.argmin(finite))}", int((~finite).sum()))
            usable &= finite
        if not usable.any():
            return None
        steps: Sequence[int] = range(length) if usable.all() else tuple(np.flatnonzero(usable).tolist())
        return Trajectory(name, length, steps)

    @property
    def _wanted(self) -> tuple[str, ...]:
        task = () if self._task is None else (self._task,)
        action = (self.layout.action,) if self.layout.action else ()
        return (*self.layout.cameras, *(part.feature for part in self.layout.parts), *action, *task)

    @property
    def _counted(self) -> str:
        """A feature with one small value per step."""
        small = (name for name in ("is_first", "is_last", "is_terminal") if name in self._features.vectors)
        return next(small, self._task or self.layout.cameras[0])

    def _numbers(self, example: Mapping[str, Values], name: str) -> np.ndarray:
        """float64 [T, n]. Raises DataError where the values do not fill whole steps."""
        values, size = example[f"{_STEPS}/{name}"].numbers(), self._features.vectors[name]
        if len(values) % size:
            raise DataError(f"{name}: {len(values)} values in rows of {size}")
        return values.reshape(-1, size)

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[Record]:
        for name in sorted(wanted):
            place = self._places[name]
            example = open_shard(place.file).example(place.offset)
            chosen = sorted(wanted[name])
            pictures = [_at(example[f"{_STEPS}/{camera}"], chosen, name) for camera in self.layout.cameras]
            tasks = _at(example[f"{_STEPS}/{self._task}"], chosen, name) if self._task else [b""] * len(chosen)
            numbers = {one: self._numbers(example, one) for one in self._wanted if one in self._features.vectors}
            for step, task, *stored in zip(chosen, tasks, *pictures, strict=True):
                yield self._record(name, step, bytes(task), stored, numbers)

    def _record(
        self, name: str, step: int, task: bytes, stored: list[memoryview], numbers: Mapping[str, np.ndarray]
    ) -> Record:
        images = [self.layout.view(CompressedImage("", data).decode(), camera) for camera, data in enumerate(stored)]
        state = self.layout.joined({one: values[step : step + 1] for one, values in numbers.items()})
        words = normalised(task.decode(errors="replace")) or self.layout.instruction
        if not words:
            raise DataError(f"{self.path}: {name} step {step}: the task is empty; give it with --instruction")
        action = numbers[self.layout.action][step].astype(np.float32) if self.layout.action else None
        return Record(name, step, Observation(images[0], words, state, tuple(images[1:])), action)

    def describe(self) -> dict[str, Any]:
        read = [self._root / name for name in (_FEATURES, _INFO) if (self._root / name).is_file()]
        return {
            "kind": "rlds",
            "path": f"{self._root.resolve().parent.name}/{self._root.resolve().name}",
            "sha256": signature(self._root, read, self._files),
            "layout": self.layout.to_json() | {"task": self._task},
        }


def _shards(root: Path) -> tuple[list[Path], str]:
    """The shards, and what is missing of them in words. Raises DataError for another format, or where there is none."""
    path, expected = root / _INFO, 0
    if path.is_file():
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            expected = sum(len(split.get("shardLengths", ())) for split in raw.get("splits", ()))
            form = raw.get("fileFormat") or "tfrecord"
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); copy it again") from error
        if form != "tfrecord":
            raise DataError(f"{path}: fileFormat {form!r} is not supported; prepare the set again as tfrecord")
    files = sorted(root.glob("*.tfrecord*"))
    if not files:
        raise DataError(f"{root}: no *.tfrecord* file beside {_FEATURES}; the set was not copied whole")
    return files, f"{len(files)} of {expected}" if len(files) < expected else ""


def _at(values: Values, steps: Sequence[int], name: str) -> list[memoryview]:
    """The texts of ascending steps. Raises DataError where there are fewer."""
    found, wanted = [], set(steps)
    for step, value in enumerate(values.texts()):
        if step in wanted:
            found.append(value)
        if step >= steps[-1]:
            break
    if len(found) < len(steps):
        raise DataError(f"{name}: a step has no picture or text; the record is incomplete")
    return found
