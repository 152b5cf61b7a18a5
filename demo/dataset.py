"""Demonstration episodes: one safetensors file each, read whole into memory for training."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vla_policy.core.errors import ArtefactError, DataError


@dataclass(frozen=True)
class Demonstrations:
    """Decisions of all episodes, concatenated.

    images: uint8 [N, S, S, 3]; states: float32 [N, 5]; actions: float32 [N, K], the expert's clean labels;
    aux: float32 [N, 6], positions of target and goal in metres (training only); task: int64 [N] into `instructions`;
    weight: float32 [N], relative sampling frequency.
    """

    images: Tensor
    states: Tensor
    actions: Tensor
    aux: Tensor
    task: Tensor
    instructions: tuple[str, ...]
    episodes: int

    def __len__(self) -> int:
        return len(self.images)


def load_demonstrations(folders: list[Path]) -> Demonstrations:
    """Reads every episode in `folders`. Raises ArtefactError for a damaged file, DataError for non-finite values."""
    paths = sorted(path for folder in folders for path in folder.glob("*.safetensors"))
    if not paths:
        raise ArtefactError(f"{', '.join(map(str, folders))}: no episode files; run `python -m demo.collect` first")
    columns: dict[str, list[Tensor]] = {name: [] for name in ("image", "state", "action", "aux")}
    tasks: list[Tensor] = []
    instructions: dict[str, int] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as stream:
                metadata = stream.metadata() or {}
                episode = {name: stream.get_tensor(name) for name in columns}
        except SafetensorError as error:
            raise ArtefactError(f"{path}: damaged or truncated ({error}); delete it and collect again") from error
        if not all(torch.isfinite(episode[name]).all() for name in ("state", "action")):
            raise DataError(f"{path}: state or action is not finite; delete it and collect again")
        for name, tensor in episode.items():
            columns[name].append(tensor)
        instruction = instructions.setdefault(_instruction(metadata, path), len(instructions))
        tasks.append(torch.full((len(episode["image"]),), instruction))
    return Demonstrations(
        images=torch.cat(columns["image"]),
        states=torch.cat(columns["state"]).float(),
        actions=torch.cat(columns["action"]).float(),
        aux=torch.cat(columns["aux"]).float(),
        task=torch.cat(tasks),
        instructions=tuple(instructions),
        episodes=len(paths),
    )


def _instruction(metadata: dict[str, str], path: Path) -> str:
    if "instruction" not in metadata:
        raise ArtefactError(f"{path}: its metadata has no instruction; it is no demonstration episode")
    text = metadata["instruction"]
    return json.loads(text) if text.startswith('"') else text


def percentiles(values: Tensor) -> tuple[list[float], list[float]]:
    """1st and 99th percentile per column, as OpenVLA's statistics have them."""
    array = values.numpy().astype(np.float64)
    return np.quantile(array, 0.01, axis=0).tolist(), np.quantile(array, 0.99, axis=0).tolist()
