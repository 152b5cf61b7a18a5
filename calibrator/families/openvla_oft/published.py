"""An OpenVLA-OFT checkpoint as published -> a policy folder: safetensors, and a config.json that tells everything.

OpenVLA-OFT keeps its action head and its state projector as pickled state dicts beside the merged model, its statistics
in `dataset_statistics.json`, and the number of images and actions per decision and what its statistics are used for in
command lines and source code. Here they are brought together once, on a workstation; whatever loads the folder
afterwards meets no pickle.
"""

import argparse
import json
import os
import pickle  # for the name of the error only
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from calibrator.families.loading import LORA_ADAPTER, find_tensors, stored_shapes, weight_files
from calibrator.tensors import disk_errors
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.families.openvla_oft import FAMILY, OftConfig
from vla_policy.core.outputs import atomic_folder, check_folder
from vla_policy.core.policy_config import NORMALIZATION_KEY, POLICY, Normalization, read_raw

_OWN_SHARD = "model-oft.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class OftSettings:
    """What the published files do not tell.

    chunk, images: actions that a decision holds, and images that it looks at. normalization: which statistics are -1
    and 1. state_names: of the state's values, empty without a state projector. lora_merged: the weights contain what
    `lora_adapter/` beside them holds.
    """

    chunk: int
    images: int
    normalization: Normalization
    state_names: tuple[str, ...] = ()
    lora_merged: bool = False


def import_oft(checkpoint: Path, out: Path, settings: OftSettings) -> OftConfig:
    """Writes the policy folder `out`. Shards are linked where the disk allows it, copied otherwise.

    Raises ArtefactError for a file that is missing, ambiguous, damaged, more than tensors, or a part that would be left
    out, and PolicyError for tensors, statistics or settings that do not fit.
    """
    check_folder(out, POLICY, [checkpoint])
    head, projector = _part(checkpoint, "action_head"), _part(checkpoint, "proprio_projector")
    if head is None:
        raise ArtefactError(
            f"{checkpoint}: no action_head--*_checkpoint.pt; is this an OpenVLA-OFT policy with an L1 head?"
        )
    used = [path for path in (head, projector) if path is not None]
    shards = weight_files(checkpoint, used + [checkpoint / LORA_ADAPTER] * settings.lora_merged)
    parts = {path: _tensors(path) for path in used}
    raw: dict[str, Any] = read_raw(checkpoint) | {
        "model_type": "openvla_oft",
        "num_actions_chunk": settings.chunk,
        "num_images_in_input": settings.images,
        "use_proprio": projector is not None,
        NORMALIZATION_KEY: settings.normalization,
        "kind": POLICY.name,
    }
    _name_state(raw, settings.state_names, 0 if projector is None else _inputs(parts[projector], projector), checkpoint)
    config = FAMILY.config(raw, str(checkpoint / "config.json"))
    shapes = ((path, name, tuple(value.shape)) for path, part in parts.items() for name, value in part.items())
    find_tensors(chain(stored_shapes(shards), shapes), config, checkpoint)
    own = {name: value for part in parts.values() for name, value in part.items()}
    with atomic_folder(out, POLICY) as folder:
        for path in shards:
            _link(path, folder / path.name)
        weight_map = {name: path.name for path, name, _ in stored_shapes(shards)} | dict.fromkeys(own, _OWN_SHARD)
        with disk_errors():
            save_file(own, folder / _OWN_SHARD, metadata={"format": "pt"})
        (folder / _INDEX).write_text(json.dumps({"weight_map": weight_map}, indent=1) + "\n")
        (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
        tokenizer = checkpoint / "tokenizer.json"
        if not tokenizer.is_file():
            raise ArtefactError(f"{tokenizer}: no such file; a policy folder needs its tokenizer.json")
        shutil.copyfile(tokenizer, folder / tokenizer.name)
    return config


def _part(checkpoint: Path, name: str) -> Path | None:
    """`NAME--STEP_checkpoint.pt`, None where there is no such file; of several, any would be a guess."""
    found = sorted(checkpoint.glob(f"{name}--*_checkpoint.pt"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ArtefactError(f"{checkpoint}: several {name} files ({names}); keep the one of the merged model")
    return found[0] if found else None


def _tensors(path: Path) -> dict[str, Tensor]:
    """A pickled state dict's tensors by their names in a policy; `weights_only` never executes anything in the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ArtefactError(f"{path}: damaged, or holds more than tensors ({reason}); it was not loaded") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ArtefactError(f"{path}: expected a state dict of tensors")
    prefix = path.name.split("--")[0]
    # Data-parallel training prefixes every name.
    return {f"{prefix}.{name.removeprefix('module.')}": value.contiguous() for name, value in state.items()}


def _inputs(projector: Mapping[str, Tensor], path: Path) -> int:
    """How many values of state the projector takes."""
    weight = projector.get("proprio_projector.fc1.weight")
    if weight is None or weight.dim() != 2:
        raise PolicyError(f"{path}: has no matrix fc1.weight; is this OpenVLA-OFT's projector of the state?")
    return weight.shape[1]


def _name_state(raw: dict[str, Any], names: Sequence[str], size: int, checkpoint: Path) -> None:
    """Writes the names into every data set's statistics. Raises PolicyError unless there is one for each value."""
    if len(names) != size:
        raise PolicyError(
            f"{checkpoint}: the policy takes a state of {size} values, --state-names gives {len(names)} "
            f"({', '.join(names) or 'none'}); name each, as the contract does"
        )
    statistics = raw.get("norm_stats")
    for stats in statistics.values() if names and isinstance(statistics, dict) else ():
        if isinstance(stats, dict) and isinstance(stats.get("proprio"), dict):
            stats["proprio"]["names"] = list(names)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m calibrator import-oft", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder as published, LoRA weights merged")
    parser.add_argument("--out", type=Path, required=True, help="policy folder to write")
    parser.add_argument(
        "--chunk", type=int, required=True, help="actions that one decision holds; published: LIBERO 8, ALOHA 25"
    )
    parser.add_argument(
        "--images", type=int, required=True, help="images that one decision looks at; published: LIBERO 2, ALOHA 3"
    )
    parser.add_argument(
        "--normalization",
        choices=get_args(Normalization),
        required=True,
        help="what -1 and 1 of actions and state are in the statistics: min and max (bounds; published: ALOHA) or q01 "
        "and q99 (bounds_q99; published: LIBERO, Bridge)",
    )
    parser.add_argument(
        "--state-names",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of the state's values, in order; published LIBERO policies: x y z, axis-angle, two fingers",
    )
    parser.add_argument(
        "--lora-merged",
        action="store_true",
        help="the weights contain the lora_adapter/ that lies beside them, as OpenVLA-OFT's own scripts leave it",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """The command line of `import_oft`."""
    args = _parser().parse_args(argv)
    settings = OftSettings(args.chunk, args.images, args.normalization, tuple(args.state_names), args.lora_merged)
    config = import_oft(args.checkpoint, args.out, settings)
    state = f"a state of {config.state_dim} values" if config.use_proprio else "no state"
    print(
        f"{args.out}: {config.horizon} actions of {config.action_dim} values, {config.num_images} images, {state}; "
        f"normalised by {config.normalization}"
    )
    return 0
