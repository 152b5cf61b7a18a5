"""Where calibration states come from: rosbag2 recordings, LIBERO's HDF5 demonstrations, episode files.

One bad part (a message, a step, a demonstration, a file of a folder) is left out and counted with an example.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from calibrator.data import hdf5
from calibrator.data.calibration import Source, SourceIndex, Trajectory
from vla_policy.core.bag import is_bag, read_frames
from vla_policy.core.contract import Contract
from vla_policy.core.errors import DataError
from vla_policy.core.files import sha256_file, sha256_folder
from vla_policy.core.instruction import normalised
from vla_policy.core.left_out import Tally
from vla_policy.core.observation import Observation
from vla_policy.core.observe import observe
from vla_policy.core.ros_image import CompressedImage
from vla_policy.core.synchroniser import Dropped, DropReason, Frame


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
                advice = "; give it with --instruction" if item.reason is DropReason.NO_INSTRUCTION else ""
                tally.add(item.topic, item.reason.value, item.detail + advice)
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


class EpisodeSource:
    """A folder of episodes as `demo.collect` writes them, one safetensors file each.

    `png` holds the T images one after another, `png_end` [T] where each ends, `state` [T, S] the robot's, and the
    metadata the `instructions` (JSON), the episode's own first. instruction: of files without.
    """

    def __init__(self, path: Path, instruction: str = "") -> None:
        self.path = str(path)
        self._instruction = instruction

    def index(self) -> SourceIndex:
        """Every image and state once. Raises DataError for an episode whose task nobody tells."""
        found: list[Trajectory] = []
        tally = Tally()
        for path in self._files():
            try:
                episode = _load_episode(path)
            except DataError as error:
                tally.add(path.name, "cannot be read", str(error))
                continue
            self._told(path, episode)
            finite = np.isfinite(episode.states).all(1)
            usable: list[int] = []
            for step in range(len(finite)):
                try:
                    episode.image(step)
                except DataError as error:
                    tally.add("png", DropReason.UNDECODABLE.value, f"{path.name} step {step}: {error}")
                    continue
                if finite[step]:
                    usable.append(step)
                else:
                    tally.add("state", "not finite", f"{path.name} step {step}")
            if usable:
                found.append(Trajectory(path.stem, len(finite), tuple(usable)))
        return SourceIndex(tuple(found), tally.found)

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[tuple[str, int, Observation]]:
        for path in self._files():
            if path.stem not in wanted:
                continue
            episode = _load_episode(path)
            instruction = self._told(path, episode)
            for step in sorted(wanted[path.stem]):
                state = episode.states[step].astype(np.float32)
                yield path.stem, step, Observation(episode.image(step), instruction, state)

    def describe(self) -> dict[str, Any]:
        digest = sha256_folder(self.path, ("*.safetensors",))
        return {"kind": "episodes", "path": Path(self.path).name, "sha256": digest}

    def _files(self) -> list[Path]:
        return sorted(item for item in Path(self.path).iterdir() if item.suffix == ".safetensors")

    def _told(self, path: Path, episode: "_Episode") -> str:
        instruction = episode.instruction or self._instruction
        if not instruction:
            raise DataError(f'{path}: its metadata has no instructions; give the task with --instruction "..."')
        return instruction


@dataclass(frozen=True)
class _Episode:
    """A file's tensors, and its own instruction, empty where it has none."""

    png: np.ndarray
    ends: np.ndarray
    states: np.ndarray
    instruction: str

    def image(self, step: int) -> np.ndarray:
        """uint8 [H, W, 3]. Raises DataError where it is damaged."""
        start = int(self.ends[step - 1]) if step else 0
        return CompressedImage("png", memoryview(self.png[start : int(self.ends[step])].tobytes())).decode()


def _load_episode(path: Path) -> _Episode:
    """Raises DataError for a file that is no episode."""
    try:
        with safe_open(path, framework="numpy") as stream:
            png, ends, states = (stream.get_tensor(name) for name in ("png", "png_end", "state"))
            instructions = json.loads((stream.metadata() or {}).get("instructions", "[]"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable episode with png and state ({error}); collect it again") from error
    if states.ndim != 2 or ends.ndim != 1 or len(states) != len(ends):
        shapes = f"png_end {list(ends.shape)}, state {list(states.shape)}"
        raise DataError(f"{path}: {shapes}: expected one state per image; collect it again")
    first = instructions[0] if isinstance(instructions, list) and instructions else ""
    return _Episode(png, ends, states, normalised(first) if isinstance(first, str) else "")


def open_sources(
    paths: Sequence[Path], contract: Contract | None, namespace: str, layout: hdf5.Hdf5Layout, instruction: str = ""
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
        elif path.suffix in hdf5.SUFFIXES or suffixes & set(hdf5.SUFFIXES):
            sources.append(hdf5.Hdf5Source(path, layout, instruction))
        elif ".safetensors" in suffixes:
            sources.append(EpisodeSource(path, instruction))
        else:
            raise DataError(f"{path}: is neither a rosbag2 folder, an HDF5 file nor a folder of episodes")
    return sources
