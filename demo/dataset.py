"""Demonstration episodes: one safetensors file each, read whole into memory for training.

With T frames, I instructions and K action dimensions a file has: `png` uint8 [bytes], the T images one after another,
and `png_end` int64 [T], where each ends; `state` float32 [T, 5]; for each instruction the expert's answer `action`
float32 [T, I, K], whether it is `valid` bool [T, I], positions `aux` float32 [T, I, 6] of target and goal, and where in
the image the target is, `seen_at` float32 [T, I, 2]. The metadata name the I instructions, the episode's own first.
"""

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vla_policy.core.errors import ArtefactError, DataError
from vla_policy.core.ros_image import CompressedImage

_COLUMNS = ("png", "png_end", "state", "action", "valid", "aux", "seen_at")


@dataclass(frozen=True)
class Demonstrations:
    """Decisions of all episodes, concatenated. Each of the N images has the answers to several instructions.

    images: uint8 [N, S, S, 3]; states: float32 [N, 5]. seen_at: float32 [N, C, 2], where in the image the target of
    each of the C `instructions` is, from (0, 0) to (1, 1), NaN where the scene has none. The M answers: actions float32
    [M, K], the expert's clean labels; aux float32 [M, 6], positions of target and goal in metres; instruction int64
    [M] into `instructions`; image int64 [M] into `images`. episode: int64 [N], each image's. own: int64 [N], the answer
    to the instruction that the episode was about; other answers exist where the expert's meant something.
    """

    images: Tensor
    states: Tensor
    seen_at: Tensor
    actions: Tensor
    aux: Tensor
    instruction: Tensor
    image: Tensor
    episode: Tensor
    own: Tensor
    instructions: tuple[str, ...]
    episodes: int

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Demonstrations":
        """The same with all tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def load_demonstrations(folders: list[Path]) -> Demonstrations:
    """Reads every episode in `folders`. Raises ArtefactError for a damaged file, DataError for non-finite values."""
    paths = sorted(path for folder in folders for path in folder.glob("*.safetensors"))
    if not paths:
        raise ArtefactError(f"{', '.join(map(str, folders))}: no episode files; run `python -m demo.collect` first")
    parts: dict[str, list[Tensor]] = {}
    places: list[tuple[Tensor, Tensor]] = []
    instructions: dict[str, int] = {}
    images = answers = 0
    for number, path in enumerate(paths):
        episode, asked = _read(path)
        frames, positions = episode["valid"].nonzero(as_tuple=True)
        numbers = torch.tensor([instructions.setdefault(text, len(instructions)) for text in asked])
        # Row-major order puts every frame's own answer, which is always valid, first among that frame's answers.
        own = answers + (positions == 0).nonzero().squeeze(1)
        for name, tensor in {
            "images": episode["image"],
            "states": episode["state"].float(),
            "actions": episode["action"][frames, positions].float(),
            "aux": episode["aux"][frames, positions].float(),
            "instruction": numbers[positions],
            "image": images + frames,
            "episode": torch.full((len(episode["image"]),), number),
            "own": own,
        }.items():
            parts.setdefault(name, []).append(tensor)
        places.append((numbers, episode["seen_at"]))
        images, answers = images + len(episode["image"]), answers + len(frames)
    columns = {name: torch.cat(tensors) for name, tensors in parts.items()}
    seen_at = torch.full((images, len(instructions), 2), torch.nan)
    frame = 0
    for numbers, pixels in places:
        seen_at[frame : frame + len(pixels), numbers] = pixels
        frame += len(pixels)
    return Demonstrations(**columns, seen_at=seen_at, instructions=tuple(instructions), episodes=len(paths))


def _read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """One episode's columns and its instructions."""
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            if "instructions" not in metadata:
                raise ArtefactError(f"{path}: its metadata has no instructions; it is no demonstration episode")
            episode = {name: stream.get_tensor(name) for name in _COLUMNS}
    except SafetensorError as error:
        raise ArtefactError(f"{path}: damaged or truncated ({error}); delete it and collect again") from error
    if not all(torch.isfinite(episode[name]).all() for name in ("state", "action", "aux", "seen_at")):
        raise DataError(f"{path}: a state, an action or a position is not finite; delete it and collect again")
    episode["image"] = _decode(episode["png"].numpy(), episode["png_end"].tolist(), path)
    if not episode["valid"][:, 0].all():
        raise DataError(f"{path}: a frame lacks the answer to its own instruction; delete it and collect again")
    return episode, json.loads(metadata["instructions"])


def encode_png(image: np.ndarray) -> np.ndarray:
    """uint8 [bytes]: the picture uint8 [S, S, 3] without loss."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return np.frombuffer(stream.getvalue(), np.uint8)


def _decode(png: np.ndarray, ends: list[int], path: Path) -> Tensor:
    try:
        parts = [memoryview(png[a:b].tobytes()) for a, b in zip([0, *ends], ends, strict=False)]
        return torch.from_numpy(np.stack([CompressedImage("png", part).decode() for part in parts]))
    except (DataError, ValueError) as error:
        raise ArtefactError(f"{path}: an image is damaged ({error}); delete it and collect again") from error


def percentiles(values: Tensor) -> tuple[list[float], list[float]]:
    """1st and 99th percentile per column, as OpenVLA's statistics have them."""
    array = values.numpy().astype(np.float64)
    return np.quantile(array, 0.01, axis=0).tolist(), np.quantile(array, 0.99, axis=0).tolist()
