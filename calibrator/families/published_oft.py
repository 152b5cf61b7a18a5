"""An OpenVLA-OFT checkpoint as published -> a policy folder: safetensors, and a config.json that tells everything.

OpenVLA-OFT keeps its action head and its state projector as pickled state dicts beside the merged model, its statistics
in `dataset_statistics.json`, and the number of images and actions per decision in command lines. Here they are brought
together once, on a workstation; whatever loads the folder afterwards meets no pickle.
"""

import json
import os
import pickle  # for the name of the error only
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from calibrator.families.loading import weight_files
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.files import atomic_folder, read_json
from vla_policy.core.policy_config import PolicyConfig

LIBERO_STATE = ("x", "y", "z", "rotation_x", "rotation_y", "rotation_z", "finger_left", "finger_right")
"""The published LIBERO policies' state: hand position (m), axis-angle (rad), finger positions (m)."""

_OWN_SHARD = "model-oft.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class OftSettings:
    """What the published files do not tell; the defaults are those of the LIBERO policies."""

    chunk: int = 8
    images: int = 2
    state_names: tuple[str, ...] = LIBERO_STATE


def import_oft(checkpoint: Path, out: Path, settings: OftSettings) -> PolicyConfig:
    """Writes the policy folder `out`. Shards are linked where the disk allows it, copied otherwise.

    Raises ArtefactError for a file that is missing, ambiguous, damaged or more than tensors, and PolicyError for
    statistics that do not fit.
    """
    head, projector = _part(checkpoint, "action_head"), _part(checkpoint, "proprio_projector")
    if not head:
        raise ArtefactError(
            f"{checkpoint}: no action_head--*_checkpoint.pt; is this an OpenVLA-OFT policy with an L1 head?"
        )
    raw: dict[str, Any] = read_json(checkpoint / "config.json") | {
        "num_actions_chunk": settings.chunk,
        "num_images_in_input": settings.images,
        "use_proprio": bool(projector),
    }
    statistics = checkpoint / "dataset_statistics.json"
    if statistics.is_file():
        raw["norm_stats"] = read_json(statistics)
    if projector:
        _name_state(raw, settings.state_names, checkpoint)
    config = PolicyConfig.from_dict(raw, str(checkpoint))
    with atomic_folder(out) as folder:
        weight_map: dict[str, str] = {}
        for path in weight_files(checkpoint):
            _link(path, folder / path.name)
            with safe_open(path, framework="pt") as stream:
                weight_map |= dict.fromkeys(stream.keys(), path.name)
        save_file(head | projector, folder / _OWN_SHARD, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(head | projector, _OWN_SHARD)
        (folder / _INDEX).write_text(json.dumps({"weight_map": weight_map}, indent=1) + "\n")
        (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
        tokenizer = checkpoint / "tokenizer.json"
        if not tokenizer.is_file():
            raise ArtefactError(f"{tokenizer}: no such file; a policy folder needs its tokenizer.json")
        shutil.copyfile(tokenizer, folder / tokenizer.name)
    return config


def _part(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of `NAME--STEP_checkpoint.pt`, none where there is no such file; of several, any would be a guess."""
    found = sorted(checkpoint.glob(f"{name}--*_checkpoint.pt"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ArtefactError(f"{checkpoint}: several {name} files ({names}); keep the one of the merged model")
    return _tensors(found[0], f"{name}.") if found else {}


def _tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """A pickled state dict's tensors; `weights_only` never executes anything else in the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ArtefactError(f"{path}: damaged, or holds more than tensors ({reason}); it was not loaded") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ArtefactError(f"{path}: expected a state dict of tensors")
    # Data-parallel training prefixes every name.
    return {prefix + name.removeprefix("module."): value.contiguous() for name, value in state.items()}


def _name_state(raw: dict[str, Any], names: Sequence[str], checkpoint: Path) -> None:
    for key, stats in raw.get("norm_stats", {}).items():
        proprio = stats.get("proprio")
        if not proprio or len(proprio["q01"]) != len(names):
            size = len(proprio["q01"]) if proprio else 0
            raise PolicyError(
                f"{checkpoint}: norm_stats.{key}.proprio has {size} values, but {len(names)} names are given "
                f"({', '.join(names)}); name each with --state-names"
            )
        stats["proprio"] = proprio | {"names": list(names)}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
