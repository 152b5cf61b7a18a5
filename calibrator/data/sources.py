"""Where calibration states come from: rosbag2 recordings, LIBERO's HDF5 demonstrations, episode files.

One bad part (a message, a step, a demonstration, a file of a folder) is left out and counted with an example.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from safetensors import SafetensorError, safe_open

from calibrator.data.calibration import Source, SourceIndex, Trajectory
from calibrator.data.libero import written_instruction
from vla_policy.core.bag import is_bag, read_frames
from vla_policy.core.contract import Contract
from vla_policy.core.errors import DataError
from vla_policy.core.files import sha256_file, sha256_folder
from vla_policy.core.image import centre_crop, rotate_180
from vla_policy.core.instruction import normalised
from vla_policy.core.left_out import Tally
from vla_policy.core.observation import Observation
from vla_policy.core.observe import observe
from vla_policy.core.ros_image import CompressedImage
from vla_policy.core.synchroniser import Dropped, DropReason, Frame

_HDF5 = (".hdf5", ".h5")
# What h5py raises for a link that leads nowhere, a filter that fails or is not there, and bytes that are no HDF5.
_H5_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError)
_UNREADABLE, _MISSING, _WRONG_TYPE = "cannot be read", "missing", "wrong type or shape"
_NOT_FINITE, _LENGTHS, _EMPTY = "not finite", "different lengths", "no steps"


class BagSource:
    """A rosbag2 recording read through the topic contract that the node uses, cut into the synchroniser's episodes.

    instruction: the task of frames before the first one that the bag holds.
    """

    def __init__(self, path: Path, contract: Contract, namespace: str = "", instruction: str = "") -> None:
        self.path = str(path)
        self._contract = contract
        self._namespace = namespace
        self._instruction = instruction

    def index(self) -> SourceIndex:
        """Every frame once. A frame whose image cannot be decoded counts in its episode but cannot be chosen."""
        lengths: Counter[str] = Counter()
        usable: dict[str, list[int]] = {}
        tally = Tally()
        for item in self._frames():
            if isinstance(item, Dropped):
                tally.add(item.topic, item.reason.value, item.detail)
                continue
            name = _episode(item)
            lengths[name] = max(lengths[name], item.step + 1)
            try:
                observe(item, self._contract)
            except DataError as error:
                tally.add(self._contract.primary.topic, DropReason.UNDECODABLE.value, str(error))
                continue
            usable.setdefault(name, []).append(item.step)
        found = [Trajectory(name, lengths[name], tuple(steps)) for name, steps in usable.items()]
        return SourceIndex(tuple(found), tally.found)

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[tuple[str, int, Observation]]:
        for item in self._frames():
            if isinstance(item, Frame) and item.step in wanted.get(_episode(item), ()):
                yield _episode(item), item.step, observe(item, self._contract)

    def describe(self) -> dict[str, Any]:
        path = Path(self.path)
        digest = sha256_folder(path) if path.is_dir() else sha256_file(path)
        return {"kind": "bag", "path": path.name, "sha256": digest, "contract_sha256": self._contract.sha256}

    def _frames(self) -> Iterator[Frame | Dropped]:
        return read_frames(self.path, self._contract, self._namespace, self._instruction)


def _episode(frame: Frame) -> str:
    return f"episode_{frame.episode}"


@dataclass(frozen=True)
class Hdf5Layout:
    """Where LIBERO's files keep what a policy sees, relative to `data/<demo>/`.

    images: one dataset per camera, in the policy's order. Stored upside down; OpenVLA's were turned by 180 degrees.
    state: datasets that are joined, such as obs/ee_states and obs/gripper_states for OpenVLA-OFT.
    """

    images: tuple[str, ...] = ("obs/agentview_rgb",)
    state: tuple[str, ...] = ()
    rotate_180: bool = True
    crop_area: float = 1.0


class _Unfit(Exception):
    """A demonstration that cannot be used: the dataset, the reason, and an example."""

    def __init__(self, where: str, reason: str, example: str) -> None:
        super().__init__(where, reason, example)
        self.where, self.reason, self.example = where, reason, example


class Hdf5Source:
    """LIBERO demonstrations in one HDF5 file, or in a folder of them, one per task.

    instruction: the task of files that do not tell theirs.
    """

    def __init__(self, path: Path, layout: Hdf5Layout, instruction: str = "") -> None:
        self.path = str(path)
        self._layout = layout
        self._instruction = instruction

    def index(self) -> SourceIndex:
        found: list[Trajectory] = []
        tally, notes = Tally(), []
        for path in self._files():
            try:
                with _open_hdf5(path) as file:
                    found += self._trajectories(path, file, tally)
                    notes += self._note(path, file)
            except _Unfit as unfit:
                if not Path(self.path).is_dir():
                    raise DataError(f"{path}: {unfit.example}") from unfit
                tally.add(path.name, unfit.reason, unfit.example)
        return SourceIndex(tuple(found), tally.found, tuple(notes))

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[tuple[str, int, Observation]]:
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
                            yield name, step, self._observation(demo, step, instruction)
            except (_Unfit, *_H5_ERRORS) as error:
                raise DataError(f"{path}: cannot be read any more ({error}); did it change meanwhile?") from error

    def describe(self) -> dict[str, Any]:
        layout, path = self._layout, Path(self.path)
        return {
            "kind": "hdf5",
            "path": path.name,
            "sha256": sha256_folder(path, [f"*{suffix}" for suffix in _HDF5]) if path.is_dir() else sha256_file(path),
            "images": list(layout.images),
            "state": list(layout.state),
            "rotate_180": layout.rotate_180,
            "crop_area": layout.crop_area,
        }

    def _files(self) -> list[Path]:
        path = Path(self.path)
        return sorted(item for item in path.iterdir() if item.suffix in _HDF5) if path.is_dir() else [path]

    def _prefix(self, path: Path) -> str:
        """What stands before a demonstration's name: in a folder, the file that holds it."""
        return f"{path.stem}/" if Path(self.path).is_dir() else ""

    def _told(self, path: Path, file: h5py.File) -> tuple[str, str]:
        """The instruction, and who says so. Raises DataError where nobody does."""
        found = written_instruction(file["data"].attrs.get("problem_info"), path.stem)
        if found is None and self._instruction:
            return self._instruction, "--instruction"
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
                demo = _member(file["data"], name, h5py.Group)
                usable = self._usable(demo, tally)
            except _Unfit as unfit:
                tally.add(unfit.where, unfit.reason, f"{self._prefix(path)}{name}: {unfit.example}")
                continue
            if usable.any():
                found.append(Trajectory(self._prefix(path) + name, len(usable), tuple(np.flatnonzero(usable).tolist())))
        return found

    def _usable(self, demo: h5py.Group, tally: Tally) -> np.ndarray:
        """bool [T]: the steps whose images can be read and whose state is finite. Raises _Unfit for the whole."""
        images = [_image(demo, key) for key in self._layout.images]
        states = [_state(demo, key) for key in self._layout.state]
        keys = (*self._layout.images, *self._layout.state)
        lengths = {key: len(item) for key, item in zip(keys, images + states, strict=True)}
        if len(set(lengths.values())) > 1:
            raise _Unfit(min(lengths), _LENGTHS, ", ".join(f"{key} {length}" for key, length in lengths.items()))
        usable = np.ones(len(images[0]), bool)
        if not usable.size:
            raise _Unfit(self._layout.images[0], _EMPTY, "0 steps")
        for key, dataset in zip(self._layout.images, images, strict=True):
            usable &= _counted(tally, demo, key, _UNREADABLE, _readable(dataset))
        for key, values in zip(self._layout.state, states, strict=True):
            usable &= _counted(tally, demo, key, _NOT_FINITE, np.isfinite(values).reshape(len(values), -1).all(1))
        return usable

    def _observation(self, demo: h5py.Group, step: int, instruction: str) -> Observation:
        image, *further = (self._prepare(_image(demo, key)[step]) for key in self._layout.images)
        parts = [np.ravel(_state(demo, key)[step]) for key in self._layout.state]
        state = np.concatenate(parts).astype(np.float32) if parts else None
        return Observation(image, instruction, state, tuple(further))

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        image = rotate_180(image) if self._layout.rotate_180 else image
        return centre_crop(image, self._layout.crop_area) if self._layout.crop_area < 1 else image


@contextmanager
def _open_hdf5(path: Path) -> Iterator[h5py.File]:
    """The open file. Raises _Unfit where it is none, or where reading it fails."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except _H5_ERRORS as error:
        reason = f"not a readable HDF5 file ({' '.join(str(error).split())}); copy it again"
        raise _Unfit(path.name, _UNREADABLE, reason) from error


def _held(group: h5py.Group) -> str:
    return ", ".join(sorted(group)) or "nothing"


def _member(group: h5py.Group, key: str, kind: type) -> Any:
    """The dataset or group `key`. Raises _Unfit where it is missing, something else, or a link that leads nowhere."""
    if key not in group:
        holder = group.get("obs", group)
        raise _Unfit(key, _MISSING, f"it holds {_held(holder if isinstance(holder, h5py.Group) else group)}")
    try:
        member = group[key]
    except _H5_ERRORS as error:
        raise _Unfit(key, _UNREADABLE, str(error)) from error
    if not isinstance(member, kind):
        raise _Unfit(key, _WRONG_TYPE, f"it is a {type(member).__name__.lower()}")
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


class EpisodeSource:
    """A folder of episodes as `demo.collect` writes them, one safetensors file each.

    `png` holds the T images one after another, `png_end` [T] where each ends, `state` [T, S] the robot's, and the
    metadata the `instructions` (JSON), the episode's own first. instruction: of files without.
    """

    def __init__(self, path: Path, instruction: str = "") -> None:
        self.path = str(path)
        self._instruction = instruction

    def index(self) -> SourceIndex:
        found: list[Trajectory] = []
        tally = Tally()
        for path in self._files():
            try:
                episode = self._load(path)
            except _Unfit as unfit:
                tally.add(unfit.where, unfit.reason, unfit.example)
                continue
            usable = np.isfinite(episode.states).all(1)
            if not usable.all():
                example = f"{path.name} step {int(np.argmin(usable))}"
                tally.add("state", _NOT_FINITE, example, int((~usable).sum()))
            for step in np.flatnonzero(usable).tolist():
                try:
                    episode.image(step)
                except DataError as error:
                    usable[step] = False
                    tally.add("png", DropReason.UNDECODABLE.value, f"{path.name} step {step}: {error}")
            if usable.any():
                found.append(Trajectory(path.stem, len(usable), tuple(np.flatnonzero(usable).tolist())))
        return SourceIndex(tuple(found), tally.found)

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[tuple[str, int, Observation]]:
        for path in self._files():
            if path.stem not in wanted:
                continue
            try:
                episode = self._load(path)
            except _Unfit as unfit:
                raise DataError(f"{path}: {unfit.example}; did it change meanwhile?") from unfit
            for step in sorted(wanted[path.stem]):
                state = episode.states[step].astype(np.float32)
                yield path.stem, step, Observation(episode.image(step), episode.instruction, state)

    def describe(self) -> dict[str, Any]:
        digest = sha256_folder(self.path, ("*.safetensors",))
        return {"kind": "episodes", "path": Path(self.path).name, "sha256": digest}

    def _files(self) -> list[Path]:
        return sorted(item for item in Path(self.path).iterdir() if item.suffix == ".safetensors")

    def _load(self, path: Path) -> "_Episode":
        """Raises _Unfit for a file that is no episode, DataError for one without an instruction."""
        try:
            with safe_open(path, framework="numpy") as stream:
                png, ends, states = (stream.get_tensor(name) for name in ("png", "png_end", "state"))
                told = json.loads((stream.metadata() or {}).get("instructions", "[]"))
        except (SafetensorError, OSError, ValueError) as error:
            raise _Unfit(path.name, _UNREADABLE, f"not an episode with png and state ({error})") from error
        if states.ndim != 2 or len(states) != len(ends):
            raise _Unfit(path.name, _LENGTHS, f"png_end {list(ends.shape)}, state {list(states.shape)}")
        words = told[0] if isinstance(told, list) and told and isinstance(told[0], str) else ""
        instruction = normalised(words) or self._instruction
        if not instruction:
            raise DataError(f'{path}: its metadata has no instructions; give the task with --instruction "..."')
        return _Episode(png, ends, states, instruction)


@dataclass(frozen=True)
class _Episode:
    png: np.ndarray
    ends: np.ndarray
    states: np.ndarray
    instruction: str

    def image(self, step: int) -> np.ndarray:
        """uint8 [H, W, 3]. Raises DataError where it is damaged."""
        start = int(self.ends[step - 1]) if step else 0
        return CompressedImage("png", memoryview(self.png[start : int(self.ends[step])].tobytes())).decode()


def open_sources(
    paths: Sequence[Path], contract: Contract | None, namespace: str, layout: Hdf5Layout, instruction: str = ""
) -> list[Source]:
    """One source per bag, HDF5 file, or folder of HDF5 files or episodes. Raises DataError for anything else.

    instruction: the task where a source does not tell it.
    """
    sources: list[Source] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; expected a rosbag2 folder, LIBERO HDF5 or episodes")
        suffixes = {item.suffix for item in path.iterdir()} if path.is_dir() else set()
        if is_bag(path):
            if contract is None:
                raise DataError(f"{path}: a bag needs --contract, the YAML that maps its topics")
            sources.append(BagSource(path, contract, namespace, instruction))
        elif path.suffix in _HDF5 or suffixes & set(_HDF5):
            sources.append(Hdf5Source(path, layout, instruction))
        elif ".safetensors" in suffixes:
            sources.append(EpisodeSource(path, instruction))
        else:
            raise DataError(f"{path}: is neither a rosbag2 folder, an HDF5 file nor a folder of episodes")
    return sources
