"""LIBERO's HDF5 demonstrations as calibration states: what cannot be used is left out and counted with an example."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from calibrator.data.layout import Held, RecordLayout
from calibrator.data.libero import written_instruction
from calibrator.data.records import Record, SourceIndex, Trajectory
from vla_policy.core.errors import DataError
from vla_policy.core.files import sha256_file, sha256_folder
from vla_policy.core.left_out import Tally
from vla_policy.core.observation import Observation

SUFFIXES = (".hdf5", ".h5")
# What h5py raises for a link that leads nowhere, a filter that fails or is not there, and bytes that are no HDF5.
_H5_ERRORS = (OSError, KeyError, RuntimeError)
_UNREADABLE, _MISSING, _WRONG_TYPE = "cannot be read", "missing", "wrong type or shape"
_NOT_FINITE, _LENGTHS, _EMPTY = "not finite", "different lengths", "no steps"
_ACTION = "actions"
"""What robomimic and LIBERO call them."""


class _Unfit(Exception):
    """A demonstration that cannot be used: the dataset, the reason, and an example."""

    def __init__(self, where: str, reason: str, example: str) -> None:
        super().__init__(where, reason, example)
        self.where, self.reason, self.example = where, reason, example


class Hdf5Source:
    """LIBERO demonstrations in one HDF5 file, or in a folder of them, one per task.

    The layout's names are of datasets below `data/<demo>/`; its instruction is of files that do not tell theirs.
    """

    def __init__(self, path: Path, layout: RecordLayout) -> None:
        self.path = str(path)
        self._layout = self._settled(layout)

    def index(self) -> SourceIndex:
        found: list[Trajectory] = []
        tally, notes = Tally(), []
        for path in tqdm(self._files(), desc=f"index {Path(self.path).name}", unit="file", disable=None):
            try:
                with _open_hdf5(path) as file:
                    found += self._trajectories(path, file, tally)
                    notes += self._note(path, file)
            except _Unfit as unfit:
                if not Path(self.path).is_dir():
                    raise DataError(f"{path}: {unfit.example}") from unfit
                tally.add(path.name, unfit.reason, unfit.example)
        return SourceIndex(tuple(found), tally.found, tuple(notes))

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[Record]:
        for path in self._files():
            names = {name for name in wanted if name.startswith(self._prefix(path))}
            if not names:
                continue
            try:
                with _open_hdf5(path) as file:
                    instruction, _ = self._told(path, file)
                    for name in (name for name in wanted if name in names):
                        demo = file["data"][name.removeprefix(self._prefix(path))]
                        for step in sorted(wanted[name]):
                            yield self._record(name, demo, step, instruction)
            except (_Unfit, *_H5_ERRORS) as error:
                raise DataError(f"{path}: cannot be read any more ({error}); did it change meanwhile?") from error

    def describe(self) -> dict[str, Any]:
        path = Path(self.path)
        patterns = [f"*{suffix}" for suffix in SUFFIXES]
        return {
            "kind": "hdf5",
            "path": path.name,
            "sha256": sha256_folder(path, patterns) if path.is_dir() else sha256_file(path),
            "layout": self._layout.to_json(),
        }

    def _settled(self, layout: RecordLayout) -> RecordLayout:
        """The layout by what the first demonstration holds; one that lacks something is left out later, by name."""
        for path in self._files():
            try:
                with _open_hdf5(path) as file:
                    held = _held_by_first(file)
            except _Unfit:
                continue
            if held is not None:
                named = Held(
                    cameras=layout.cameras or held.cameras,
                    vectors=[*held.vectors, *(part.feature for part in layout.parts), layout.action or _ACTION],
                    action=held.action,
                )
                return layout.settled(self.path, named)
        return replace(layout, rotation=layout.rotation or (0,))  # nothing can be read: `index` says why

    def _files(self) -> list[Path]:
        path = Path(self.path)
        return sorted(item for item in path.iterdir() if item.suffix in SUFFIXES) if path.is_dir() else [path]

    def _prefix(self, path: Path) -> str:
        """What stands before a demonstration's name: in a folder, the file that holds it."""
        return f"{path.stem}/" if Path(self.path).is_dir() else ""

    def _told(self, path: Path, file: h5py.File) -> tuple[str, str]:
        """The instruction, and who says so. Raises DataError where nobody does."""
        found = written_instruction(file["data"].attrs.get("problem_info"), path.stem)
        if found is None and self._layout.instruction:
            return self._layout.instruction, "--instruction"
        if found is None:
            raise DataError(
                f"{path}: neither data's problem_info nor the file's name tells the task in words; "
                'give it with --instruction "..."'
            )
        return found

    def _note(self, path: Path, file: h5py.File) -> list[str]:
        instruction, teller = self._told(path, file)
        return [] if teller == "problem_info" else [f"{path.name}: instruction {instruction!r} by {teller}"]

    def _trajectories(self, path: Path, file: h5py.File, tally: Tally) -> list[Trajectory]:
        """The usable ones in numeric order: demo_2 before demo_10. Raises _Unfit for a file of another layout."""
        if not isinstance(file.get("data"), h5py.Group):
            raise _Unfit(path.name, _MISSING, f"no group 'data' of demonstrations; it holds {_held(file)}")
        self._told(path, file)
        found = []
        for name in sorted(file["data"], key=lambda name: (len(name), name)):
            try:
                usable = self._usable(_member(file["data"], name, h5py.Group, where="data"), tally)
            except _Unfit as unfit:
                tally.add(unfit.where, unfit.reason, f"{self._prefix(path)}{name}: {unfit.example}")
                continue
            if usable.any():
                found.append(Trajectory(self._prefix(path) + name, len(usable), tuple(np.flatnonzero(usable).tolist())))
        return found

    def _usable(self, demo: h5py.Group, tally: Tally) -> np.ndarray:
        """bool [T]: the steps whose images can be read and whose state is finite. Raises _Unfit for the whole."""
        cameras = self._layout.cameras
        images = [_image(demo, key) for key in cameras]
        keys = (*cameras, *self._vectors)
        values = [_state(demo, key) for key in self._vectors]
        lengths = {key: len(item) for key, item in zip(keys, (*images, *values), strict=True)}
        if len(set(lengths.values())) > 1:
            raise _Unfit(keys[0], _LENGTHS, ", ".join(f"{key} {length}" for key, length in lengths.items()))
        usable = np.ones(len(images[0]), bool)
        if not usable.size:
            raise _Unfit(cameras[0], _EMPTY, "0 steps")
        for key, dataset in zip(cameras, images, strict=True):
            usable &= _counted(tally, demo, key, _UNREADABLE, _readable(dataset))
        for key, numbers in zip(self._vectors, values, strict=True):
            usable &= _counted(tally, demo, key, _NOT_FINITE, np.isfinite(numbers).reshape(len(numbers), -1).all(1))
        return usable

    @property
    def _vectors(self) -> tuple[str, ...]:
        action = (self._layout.action,) if self._layout.action else ()
        return tuple(dict.fromkeys((*(part.feature for part in self._layout.parts), *action)))

    def _record(self, name: str, demo: h5py.Group, step: int, instruction: str) -> Record:
        layout = self._layout
        image, *further = (layout.view(_image(demo, key)[step], camera) for camera, key in enumerate(layout.cameras))
        rows = {key: _state(demo, key)[step][None] for key in self._vectors}
        action = np.ravel(rows[layout.action]).astype(np.float32) if layout.action else None
        return Record(name, step, Observation(image, instruction, layout.joined(rows), tuple(further)), action)


@contextmanager
def _open_hdf5(path: Path) -> Iterator[h5py.File]:
    """The open file. Raises _Unfit where it is none, or where reading it fails."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except _H5_ERRORS as error:
        reason = f"not a readable HDF5 file ({' '.join(str(error).split())}); copy it again"
        raise _Unfit(path.name, _UNREADABLE, reason) from error


def _held_by_first(file: h5py.File) -> Held | None:
    """Cameras and numbers of the first demonstration that has any; None where there is none."""
    data = file.get("data")
    for name in sorted(data, key=lambda name: (len(name), name)) if isinstance(data, h5py.Group) else ():
        found: dict[str, h5py.Dataset] = {}

        def see(key: str, item: Any, found: dict[str, h5py.Dataset] = found) -> None:
            if isinstance(item, h5py.Dataset):
                found[key] = item

        if isinstance(data.get(name, getlink=True), h5py.HardLink) and isinstance(data[name], h5py.Group):
            data[name].visititems(see)
        if found:
            cameras = tuple(key for key, item in found.items() if item.dtype == np.uint8 and item.ndim == 4)
            vectors = [key for key in found if key not in cameras]
            return Held(cameras, vectors, action=_ACTION if _ACTION in vectors else None)
    return None


def _held(group: h5py.Group) -> str:
    return ", ".join(sorted(group)) or "nothing"


def _member(group: h5py.Group, key: str, kind: type, where: str = "") -> Any:
    """The dataset or group `key`. Raises _Unfit where it is missing, something else, or a link that leads nowhere.

    where: how the place is called, where that is not the key.
    """
    where = where or key
    link = group.get(key, getlink=True)
    if link is None:
        holder = group.get("obs", group)
        raise _Unfit(where, _MISSING, f"it holds {_held(holder if isinstance(holder, h5py.Group) else group)}")
    try:
        member = group[key]
    except _H5_ERRORS as error:
        target = f"a link to {link.path} in {link.filename}: " if isinstance(link, h5py.ExternalLink) else ""
        raise _Unfit(where, _UNREADABLE, f"{target}{error.args[0]}") from error
    if not isinstance(member, kind):
        raise _Unfit(where, _WRONG_TYPE, f"it is a {type(member).__name__.lower()}")
    return member


def _image(demo: h5py.Group, key: str) -> h5py.Dataset:
    images = _member(demo, key, h5py.Dataset)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        got = f"{images.dtype} {list(images.shape)}"
        raise _Unfit(key, _WRONG_TYPE, f"{got}, expected uint8 [steps, height, width, 3]")
    return images


def _state(demo: h5py.Group, key: str) -> np.ndarray:
    values = _member(demo, key, h5py.Dataset)
    if values.dtype.kind not in "fiu" or values.ndim < 1:
        got = f"{values.dtype} {list(values.shape)}"
        raise _Unfit(key, _WRONG_TYPE, f"{got}, expected numbers [steps] or [steps, values]")
    try:
        return values[:]
    except _H5_ERRORS as error:
        raise _Unfit(key, _UNREADABLE, str(error)) from error


def _readable(images: h5py.Dataset) -> np.ndarray:
    """bool [T]. Only chunks can be damaged so that reading notices: they are compressed or have checksums."""
    readable = np.ones(len(images), bool)
    if images.chunks is not None:
        for start in range(0, len(images), images.chunks[0]):
            part = slice(start, start + images.chunks[0])
            try:
                images[part]
            except _H5_ERRORS:
                readable[part] = False
    return readable


def _counted(tally: Tally, where: h5py.Group, key: str, reason: str, good: np.ndarray) -> np.ndarray:
    if not good.all():
        tally.add(key, reason, f"{where.name} step {int(np.argmin(good))}", int((~good).sum()))
    return good
