"""A folder of episodes as `demo.collect` writes them, one safetensors file each, as calibration states."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from calibrator.data.layout import Held, RecordLayout
from calibrator.data.records import Record, SourceIndex, Trajectory
from vla_policy.core.errors import DataError
from vla_policy.core.files import sha256_folder
from vla_policy.core.instruction import normalised
from vla_policy.core.left_out import Tally
from vla_policy.core.observation import Observation
from vla_policy.core.ros_image import CompressedImage
from vla_policy.core.synchroniser import DropReason

SUFFIX = ".safetensors"
_IMAGE, _STATE, _ACTION = "png", "state", "action"
_HELD = Held(cameras=(_IMAGE,), vectors=(_STATE, _ACTION), state=(_STATE,), action=_ACTION, rotation=(0,))


class EpisodeSource:
    """`png` holds the T images one after another, `png_end` [T] where each ends, `state` [T, S] the robot's, `action`
    [T, I, K], if it is there, the expert's answers to each of the metadata's I `instructions` (JSON), of which the
    episode's own is the first.
    """

    def __init__(self, path: Path, layout: RecordLayout) -> None:
        self.path = str(path)
        self.layout = layout.settled(self.path, _HELD)

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
                    tally.add(_IMAGE, DropReason.UNDECODABLE.value, f"{path.name} step {step}: {error}")
                    continue
                if finite[step]:
                    usable.append(step)
                else:
                    tally.add(_STATE, "not finite", f"{path.name} step {step}")
            if usable:
                found.append(Trajectory(path.stem, len(finite), tuple(usable)))
        return SourceIndex(tuple(found), tally.found)

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[Record]:
        for path in self._files():
            if path.stem not in wanted:
                continue
            episode = _load_episode(path)
            instruction = self._told(path, episode)
            for step in sorted(wanted[path.stem]):
                image = self.layout.view(episode.image(step), 0)
                state = self.layout.joined({_STATE: episode.states[step : step + 1]})
                action = None if episode.actions is None else episode.actions[step].astype(np.float32)
                yield Record(path.stem, step, Observation(image, instruction, state), action)

    def describe(self) -> dict[str, Any]:
        digest = sha256_folder(self.path, (f"*{SUFFIX}",))
        return {
            "kind": "episodes",
            "path": Path(self.path).name,
            "sha256": digest,
            "layout": self.layout.to_json(),
        }

    def _files(self) -> list[Path]:
        return sorted(item for item in Path(self.path).iterdir() if item.suffix == SUFFIX)

    def _told(self, path: Path, episode: "_Episode") -> str:
        instruction = episode.instruction or self.layout.instruction
        if not instruction:
            raise DataError(f'{path}: its metadata has no instructions; give the task with --instruction "..."')
        return instruction


@dataclass(frozen=True)
class _Episode:
    """A file's tensors, and its own instruction, empty where it has none. actions: [T, K] or None."""

    png: np.ndarray
    ends: np.ndarray
    states: np.ndarray
    actions: np.ndarray | None
    instruction: str

    def image(self, step: int) -> np.ndarray:
        """uint8 [H, W, 3]. Raises DataError where it is damaged."""
        start = int(self.ends[step - 1]) if step else 0
        return CompressedImage("png", memoryview(self.png[start : int(self.ends[step])].tobytes())).decode()


def _load_episode(path: Path) -> _Episode:
    """Raises DataError for a file that is no episode."""
    try:
        with safe_open(path, framework="numpy") as stream:
            png, ends, states = (stream.get_tensor(name) for name in (_IMAGE, "png_end", _STATE))
            actions = stream.get_tensor(_ACTION) if _ACTION in stream.keys() else None  # noqa: SIM118 (no mapping)
            instructions = json.loads((stream.metadata() or {}).get("instructions", "[]"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable episode with png and state ({error}); collect it again") from error
    if states.ndim != 2 or ends.ndim != 1 or len(states) != len(ends):
        shapes = f"png_end {list(ends.shape)}, state {list(states.shape)}"
        raise DataError(f"{path}: {shapes}: expected one state per image; collect it again")
    if actions is not None and (actions.ndim != 3 or len(actions) != len(ends) or not actions.shape[1]):
        raise DataError(
            f"{path}: action {list(actions.shape)}: expected [steps, instructions, values]; collect it again"
        )
    first = instructions[0] if isinstance(instructions, list) and instructions else ""
    own = None if actions is None else actions[:, 0]
    return _Episode(png, ends, states, own, normalised(first) if isinstance(first, str) else "")
