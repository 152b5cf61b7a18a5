"""Where calibration states come from: rosbag2 recordings, LIBERO's HDF5 demonstrations, episode files."""

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
from vla_policy.core.bag import read_frames
from vla_policy.core.contract import Contract
from vla_policy.core.errors import DataError
from vla_policy.core.files import sha256_file, sha256_folder
from vla_policy.core.image import centre_crop, rotate_180
from vla_policy.core.observation import Observation
from vla_policy.core.observe import observe
from vla_policy.core.ros_image import CompressedImage
from vla_policy.core.synchroniser import Dropped, Frame

_HDF5 = (".hdf5", ".h5")
_BAGS = (".mcap", ".db3")


class BagSource:
    """A rosbag2 recording read through the topic contract that the node uses; an episode begins per instruction."""

    def __init__(self, path: Path, contract: Contract, namespace: str = "") -> None:
        self.path = str(path)
        self._contract = contract
        self._namespace = namespace

    def index(self) -> SourceIndex:
        """Every frame once. A frame whose image cannot be decoded counts in its episode but cannot be chosen."""
        lengths: Counter[str] = Counter()
        usable: dict[str, list[int]] = {}
        left_out: Counter[str] = Counter()
        for item in self._frames():
            if isinstance(item, Dropped):
                left_out[f"{item.topic}: {item.reason.value}"] += 1
                continue
            name = _episode(item)
            lengths[name] = max(lengths[name], item.step + 1)
            try:
                observe(item, self._contract)
            except DataError:
                left_out["undecodable image"] += 1
                continue
            usable.setdefault(name, []).append(item.step)
        found = [Trajectory(name, lengths[name], tuple(steps)) for name, steps in usable.items()]
        return SourceIndex(tuple(found), left_out)

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[tuple[str, int, Observation]]:
        for item in self._frames():
            if isinstance(item, Frame) and item.step in wanted.get(_episode(item), ()):
                yield _episode(item), item.step, observe(item, self._contract)

    def describe(self) -> dict[str, Any]:
        path = Path(self.path)
        digest = sha256_folder(path) if path.is_dir() else sha256_file(path)
        return {"kind": "bag", "path": path.name, "sha256": digest, "contract_sha256": self._contract.sha256}

    def _frames(self) -> Iterator[Frame | Dropped]:
        return read_frames(self.path, self._contract, self._namespace)


def _episode(frame: Frame) -> str:
    return f"episode_{frame.episode}"


@dataclass(frozen=True)
class Hdf5Layout:
    """Where LIBERO's files keep what a policy sees, relative to `data/<demo>/`.

    Its images are stored upside down; OpenVLA's data were turned by 180 degrees. state: datasets that are joined.
    """

    image: str = "obs/agentview_rgb"
    state: tuple[str, ...] = ()
    rotate_180: bool = True
    crop_area: float = 1.0


class Hdf5Source:
    """One HDF5 file of LIBERO demonstrations; the instruction is in its `problem_info`."""

    def __init__(self, path: Path, layout: Hdf5Layout) -> None:
        self.path = str(path)
        self._layout = layout

    def index(self) -> SourceIndex:
        found: list[Trajectory] = []
        left_out: Counter[str] = Counter()
        with _open_hdf5(self.path) as file:
            self._instruction(file)
            for name, demo in _demos(file, self.path):
                images = self._images(demo)
                states = [_dataset(demo, key, self.path) for key in self._layout.state]
                lengths = {len(images), *(len(state) for state in states)}
                if len(lengths) > 1:
                    left_out["trajectory with datasets of different lengths"] += 1
                    continue
                finite = np.ones(len(images), bool)
                for state in states:
                    finite &= np.isfinite(state[:]).reshape(len(state), -1).all(1)
                left_out["state not finite"] += int((~finite).sum())
                if finite.any():
                    found.append(Trajectory(name, len(images), tuple(np.flatnonzero(finite).tolist())))
        return SourceIndex(tuple(found), +left_out)

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[tuple[str, int, Observation]]:
        with _open_hdf5(self.path) as file:
            instruction = self._instruction(file)
            for name, demo in _demos(file, self.path):
                images = self._images(demo) if name in wanted else None
                for step in sorted(wanted.get(name, ())):
                    assert images is not None
                    parts = [np.atleast_1d(demo[key][step]) for key in self._layout.state]
                    state = np.concatenate(parts).astype(np.float32) if parts else None
                    yield name, step, Observation(self._prepare(images[step]), instruction, state)

    def describe(self) -> dict[str, Any]:
        layout = self._layout
        return {
            "kind": "hdf5",
            "path": Path(self.path).name,
            "sha256": sha256_file(self.path),
            "image": layout.image,
            "state": list(layout.state),
            "rotate_180": layout.rotate_180,
            "crop_area": layout.crop_area,
        }

    def _images(self, demo: h5py.Group) -> h5py.Dataset:
        images = _dataset(demo, self._layout.image, self.path)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            shape = list(images.shape)
            raise DataError(f"{self.path}: {images.name} is {images.dtype} {shape}, expected uint8 [steps, H, W, 3]")
        return images

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        image = rotate_180(image) if self._layout.rotate_180 else image
        return centre_crop(image, self._layout.crop_area) if self._layout.crop_area < 1 else image

    def _instruction(self, file: h5py.File) -> str:
        try:
            return str(json.loads(file["data"].attrs["problem_info"])["language_instruction"])
        except (KeyError, json.JSONDecodeError) as error:
            raise DataError(
                f"{self.path}: data has no problem_info with a language_instruction ({error}); is this a LIBERO file?"
            ) from error


def _open_hdf5(path: str) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not a readable HDF5 file ({error}); copy it again") from error


def _demos(file: h5py.File, path: str) -> list[tuple[str, h5py.Group]]:
    """Demonstrations in numeric order: demo_2 before demo_10."""
    names = sorted(file["data"], key=lambda name: (len(name), name))
    if not names:
        raise DataError(f"{path}: data holds no demonstrations")
    return [(name, file["data"][name]) for name in names]


def _dataset(demo: h5py.Group, key: str, path: str) -> h5py.Dataset:
    if key not in demo:
        raise DataError(f"{path}: {demo.name} has no {key!r}; it holds {', '.join(sorted(demo.get('obs', demo)))}")
    return demo[key]


class EpisodeSource:
    """A folder of episodes as `demo.collect` writes them, one safetensors file each.

    `png` holds the T images one after another, `png_end` [T] where each ends, `state` [T, S] the robot's, and the
    metadata the `instructions` (JSON), the episode's own first.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def index(self) -> SourceIndex:
        found: list[Trajectory] = []
        left_out: Counter[str] = Counter()
        for path in self._files():
            with _open_episode(path) as stream:
                length = int(stream.get_slice("png_end").get_shape()[0])
                state = stream.get_tensor("state")
            if len(state) != length:
                left_out["trajectory with tensors of different lengths"] += 1
                continue
            finite = np.isfinite(state).all(1)
            left_out["state not finite"] += int((~finite).sum())
            found.append(Trajectory(path.stem, length, tuple(np.flatnonzero(finite).tolist())))
        return SourceIndex(tuple(found), +left_out)

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[tuple[str, int, Observation]]:
        for path in self._files():
            if path.stem not in wanted:
                continue
            with _open_episode(path) as stream:
                png, ends, states = (stream.get_tensor(name) for name in ("png", "png_end", "state"))
                instructions = json.loads((stream.metadata() or {}).get("instructions", "[]"))
            if not instructions:
                raise DataError(f"{path}: its metadata has no instructions; collect the episode again")
            for step in sorted(wanted[path.stem]):
                start = int(ends[step - 1]) if step else 0
                image = _picture(png[start : int(ends[step])].tobytes(), f"{path}: image {step}")
                yield path.stem, step, Observation(image, instructions[0], states[step].astype(np.float32))

    def describe(self) -> dict[str, Any]:
        digest = sha256_folder(self.path, ("*.safetensors",))
        return {"kind": "episodes", "path": Path(self.path).name, "sha256": digest}

    def _files(self) -> list[Path]:
        return sorted(Path(self.path).glob("*.safetensors"))


@contextmanager
def _open_episode(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as stream:
            yield stream
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a readable episode with png and state ({error}); collect it again") from error


def _picture(encoded: bytes, where: str) -> np.ndarray:
    try:
        return CompressedImage("png", memoryview(encoded)).decode()
    except DataError as error:
        raise DataError(f"{where} is damaged ({error}); collect the episode again") from error


def open_sources(
    paths: Sequence[Path], contract: Contract | None, namespace: str, layout: Hdf5Layout
) -> list[Source]:
    """One source per bag, HDF5 file or folder of episodes. Raises DataError for anything else."""
    sources: list[Source] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; expected a rosbag2 folder, LIBERO HDF5 or episodes")
        if path.suffix in _BAGS or (path / "metadata.yaml").is_file():
            if contract is None:
                raise DataError(f"{path}: a bag needs --contract, the YAML that maps its topics")
            sources.append(BagSource(path, contract, namespace))
        elif path.suffix in _HDF5:
            sources.append(Hdf5Source(path, layout))
        elif path.is_dir() and any(path.glob("*.safetensors")):
            sources.append(EpisodeSource(path))
        elif path.is_dir() and (files := sorted(item for item in path.iterdir() if item.suffix in _HDF5)):
            sources.extend(Hdf5Source(file, layout) for file in files)
        else:
            raise DataError(f"{path}: is neither a rosbag2 folder, an HDF5 file nor a folder of episodes")
    return sources
