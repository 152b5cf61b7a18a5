"""A pi0.5 or pi0 checkpoint as published -> a policy folder: safetensors, and a config.json that tells everything.

Two layouts are read. openpi's PyTorch checkpoints hold `model.safetensors`, a short `config.json` and statistics in
`assets/NAME/norm_stats.json`; what else decides the numbers is openpi's source code. lerobot's hold `config.json`,
`model.safetensors` and pre- and post-processor files, whose state files are the statistics. Neither holds a tokenizer.
"""

import argparse
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibrator.families.loading import find_tensors, open_weights, stored_shapes
from calibrator.families.pi05.noise import draw_bank
from calibrator.tensors import disk_errors
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.families.pi05 import FAMILY
from vla_policy.core.files import named_file, read_json
from vla_policy.core.flow.config import SUPPORTED, FlowConfig
from vla_policy.core.flow.conventions import CONVENTIONS
from vla_policy.core.flow.noise import NOISE
from vla_policy.core.flow.prompt import TOKENIZER, FlowPrompt
from vla_policy.core.flow.statistics import NORMALIZATIONS
from vla_policy.core.outputs import atomic_folder, check_folder
from vla_policy.core.policy_config import POLICY, mapping

_WEIGHTS = "model.safetensors"
_PREFIX = "model."
_STATISTICS = ("q01", "q99", "mean", "std")
_SIZES = ("vision_config", "text_config", "expert_config", "vocab_size")
_VARIANTS = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
_COPIED = ("num_inference_steps", "min_period", "max_period", "max_action_dim", "max_state_dim", "tokenizer_max_length")
_LEROBOT_MODES = {"QUANTILES": "quantiles", "MEAN_STD": "mean_std"}
_USUAL_MODE = {"pi05": "QUANTILES", "pi0": "MEAN_STD"}
_OF_PI0 = "action_time_mlp_in.weight"
_WITHOUT_STATE = "openpi"
"""Whose code trains pi0.5 with the state in the prompt, or without."""
_ALWAYS_STATE = f"lerobot's code writes every pi0.5's state into the prompt, only {_WITHOUT_STATE}'s may leave it out"


@dataclass(frozen=True)
class FlowSettings:
    """What the published files do not tell, None where they may.

    convention: whose preprocessing and arithmetic trained the policy. state_names: of the state's values, empty where
    the policy takes none. images, executed, action_dim: images that a decision looks at, rows of a chunk that are
    carried out, values of the robot's action. normalization: by which statistics. tokenizer: PaliGemma's.
    """

    convention: str
    state_names: tuple[str, ...] = ()
    images: int | None = None
    executed: int | None = None
    action_dim: int | None = None
    normalization: str | None = None
    tokenizer: Path | None = None
    seed: int = 0


def import_pi05(checkpoint: Path, out: Path, settings: FlowSettings) -> FlowConfig:
    """Writes the policy folder `out`. The weights are linked where the disk and their names allow it, else copied.

    Raises ArtefactError for a file that is missing or damaged, and PolicyError for tensors, statistics or settings that
    do not fit.
    """
    check_folder(out, POLICY, [checkpoint])
    weights, tokenizer = checkpoint / _WEIGHTS, settings.tokenizer or checkpoint / TOKENIZER
    if not weights.is_file():
        hint = "; JAX's params/ must first be converted by openpi's own converter" if _has_params(checkpoint) else ""
        raise ArtefactError(f"{weights}: no such file{hint}")
    if not tokenizer.is_file():
        raise ArtefactError(f"{tokenizer}: no such file; name PaliGemma's with --tokenizer")
    stored = list(stored_shapes([weights]))
    prefixed = all(name.startswith(_PREFIX) for _, name, _ in stored)
    shapes = [(path, name.removeprefix(_PREFIX) if prefixed else name, shape) for path, name, shape in stored]
    variant = "pi0" if any(name == _OF_PI0 for _, name, _ in shapes) else "pi05"
    if not settings.state_names and (variant == "pi0" or settings.convention != _WITHOUT_STATE):
        what = "this is pi0, which takes a state" if variant == "pi0" else _ALWAYS_STATE
        raise PolicyError(f"{weights}: {what}; name its values with --state-names")
    published = read_json(checkpoint / "config.json")
    source = str(checkpoint / "config.json")
    of_lerobot = (checkpoint / "policy_preprocessor.json").is_file()
    own = _lerobot(published, checkpoint, settings, variant) if of_lerobot else _openpi(published, checkpoint, settings)
    raw = own | {name: published[name] for name in _SIZES if name in published}
    raw |= {"model_type": "pi05", "variant": variant, "convention": settings.convention, "kind": POLICY.name}
    raw["state_in_prompt"] = variant == "pi05" and bool(settings.state_names)
    for key, expected in _VARIANTS.items():
        if published.get(key, expected) != expected and not raw.keys() & set(_SIZES):
            raise PolicyError(f"{source}: {key}: {published[key]!r} is not supported; only {expected!r} is")
    _cut(raw, settings, source)
    config = FAMILY.config(raw, source)
    FlowPrompt(tokenizer, config)
    find_tensors(shapes, config, checkpoint)
    with atomic_folder(out, POLICY) as folder:
        if prefixed:
            _rename(weights, folder / _WEIGHTS)
        else:
            _link(weights, folder / _WEIGHTS)
        (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        with disk_errors():
            np.save(folder / NOISE, draw_bank(config, settings.seed))
    return config


def _has_params(checkpoint: Path) -> bool:
    return (checkpoint / "params").is_dir()


def _openpi(published: Mapping[str, Any], checkpoint: Path, settings: FlowSettings) -> dict[str, Any]:
    """What openpi's files tell."""
    found = sorted((checkpoint / "assets").glob("**/norm_stats.json"))
    if not found:
        raise ArtefactError(f"{checkpoint}: no assets/NAME/norm_stats.json; copy the checkpoint's assets as well")
    for option, value in (("--images", settings.images), ("--normalization", settings.normalization)):
        if value is None:
            what = f"an openpi checkpoint does not tell its {option[2:]}"
            raise PolicyError(f"{checkpoint}: {what}; name it with {option}")
    statistics = {}
    for path in found:
        stats = mapping(read_json(path).get("norm_stats"), f"{path}: norm_stats")
        if "actions" not in stats or "state" not in stats:
            raise PolicyError(f"{path}: norm_stats: expected 'state' and 'actions', got {', '.join(sorted(stats))}")
        statistics[path.parent.relative_to(checkpoint / "assets").as_posix()] = {
            "action": _known(stats["actions"], path),
            "proprio": _known(stats["state"], path),
        }
    horizon = published.get("action_horizon")
    return {
        "chunk_size": horizon,
        "n_action_steps": settings.executed or horizon,
        "max_action_dim": published.get("action_dim", 32),
        "max_state_dim": published.get("action_dim", 32),
        "num_images_in_input": settings.images,
        "normalization": settings.normalization,
        "norm_stats": statistics,
    }


def _known(stats: Any, path: Path) -> dict[str, Any]:
    return {name: mapping(stats, str(path))[name] for name in _STATISTICS if name in stats}


def _lerobot(
    published: Mapping[str, Any], checkpoint: Path, settings: FlowSettings, variant: str
) -> dict[str, Any]:
    """What lerobot's files tell."""
    source = str(checkpoint / "config.json")
    if published.get("type") != variant:
        raise PolicyError(f"{source}: type is {published.get('type')!r}, expected {variant!r}, as the weights are")
    modes = mapping(published.get("normalization_mapping", {}), f"{source}: normalization_mapping")
    kinds = {modes.get(name, _USUAL_MODE[variant]) for name in ("STATE", "ACTION")}
    (mode, *others) = kinds
    if others or mode not in _LEROBOT_MODES:
        raise PolicyError(
            f"{source}: normalization_mapping: STATE and ACTION are {' and '.join(sorted(map(str, kinds)))}; both must "
            f"be {' or '.join(_LEROBOT_MODES)}"
        )
    features = mapping(published.get("input_features", {}), f"{source}: input_features")
    seen = [name for name, feature in features.items() if feature.get("type") == "VISUAL"]
    images = [name for name in seen if "empty_camera" not in name]
    before, after = _state_file(checkpoint, "pre", "normalizer"), _state_file(checkpoint, "post", "unnormalizer")
    statistics = {
        "action": _tensors(after, "action"),
        "proprio": _tensors(before, "observation.state"),
    }
    used = _LEROBOT_MODES[mode]
    for name, value in _tensors(before, "action").items():
        if value != statistics["action"].get(name, value):
            raise PolicyError(f"{after.name} and {before.name}: action.{name} differ; the files do not belong together")
    told = (*_COPIED, *SUPPORTED)
    return {name: published[name] for name in told if published.get(name) is not None} | {
        "chunk_size": published.get("chunk_size", 50),
        "n_action_steps": settings.executed or published.get("n_action_steps", 50),
        "num_images_in_input": settings.images or max(1, len(images)),
        "normalization": used,
        "norm_stats": {checkpoint.resolve().name: statistics},
    }


def _state_file(checkpoint: Path, side: str, kind: str) -> Path:
    """The file with the statistics of the step `kind` of the pre- or post-processor."""
    path = checkpoint / f"policy_{side}processor.json"
    steps = read_json(path).get("steps")
    found = [
        step["state_file"]
        for step in (steps if isinstance(steps, list) else [])
        if isinstance(step, dict) and step.get("registry_name") == f"{kind}_processor" and "state_file" in step
    ]
    if len(found) != 1:
        raise PolicyError(f"{path}: expected one step {kind}_processor with a state_file, found {len(found)}")
    file = named_file(checkpoint, found[0])
    if not file.is_file():
        raise ArtefactError(f"{file}: no such file, which {path.name} names; copy it again")
    return file


def _tensors(path: Path, feature: str) -> dict[str, list[float]]:
    """A feature's statistics by name."""
    with open_weights(path) as stream:
        names = {name: f"{feature}.{name}" for name in _STATISTICS}
        stored = set(stream.keys())
        return {name: stream.get_tensor(key).double().tolist() for name, key in names.items() if key in stored}


def _cut(raw: dict[str, Any], settings: FlowSettings, source: str) -> None:
    """The robot's own dimensions of the statistics, and the state's names. Raises PolicyError unless they fit."""
    for key, stats in raw["norm_stats"].items():
        if settings.action_dim is not None:
            stats["action"] = {name: values[: settings.action_dim] for name, values in stats["action"].items()}
        if not settings.state_names:
            del stats["proprio"]
            continue
        sizes = {len(values) for values in stats["proprio"].values()}
        if sizes != {len(settings.state_names)}:
            raise PolicyError(
                f"{source}: norm_stats.{key}: a state of {' or '.join(map(str, sorted(sizes))) or 'no'} values, "
                f"--state-names gives {len(settings.state_names)}; name each, as the contract does"
            )
        stats["proprio"]["names"] = list(settings.state_names)


def _rename(source: Path, target: Path) -> None:
    """The safetensors file without `model.` before its tensors' names; the numbers are copied as they are."""
    with disk_errors(), source.open("rb") as read, target.open("wb") as write:
        (length,) = struct.unpack("<Q", read.read(8))
        header = {name: value for name, value in json.loads(read.read(length)).items() if name != "__metadata__"}
        named = {name.removeprefix(_PREFIX): value for name, value in header.items()}
        text = json.dumps({"__metadata__": {"format": "pt"}, **named}).encode()
        text += b" " * (-len(text) % 8)
        write.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(read, write, 1 << 24)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _lines(config: FlowConfig) -> Iterator[str]:
    where = "in the prompt" if config.adaptive else "as a row before the actions"
    state = f"a state of {config.state_dim} values {where}" if config.takes_state else "no state"
    yield "pi0.5" if config.adaptive else "pi0"
    yield f"chunks of {config.horizon} rows, {config.executed} carried out, of {config.action_dim} values"
    yield f"{config.num_images} images, {state}"
    yield f"normalised by {config.normalization}, as {config.convention.name} does"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m calibrator import-pi05", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder as published by openpi or lerobot")
    parser.add_argument("--out", type=Path, required=True, help="policy folder to write")
    parser.add_argument(
        "--convention",
        choices=sorted(CONVENTIONS),
        required=True,
        help="whose code trained it: they resize images and write the state in other ways (lerobot_0_4: before 0.5.0)",
    )
    parser.add_argument(
        "--state-names",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of the state's values, in order, of pi0, or of a pi0.5 that was trained with the state in its "
        "prompt; leave out for one that was not (openpi's pi05_libero)",
    )
    parser.add_argument("--images", type=int, help="images that a decision looks at; lerobot's config.json tells")
    parser.add_argument(
        "--executed", type=int, help="rows of a chunk that are carried out before the next look; default: all, or "
        "n_action_steps"
    )
    parser.add_argument(
        "--action-dim", type=int, help="values of the robot's action, where the statistics are filled up to more"
    )
    parser.add_argument(
        "--normalization",
        choices=sorted(NORMALIZATIONS),
        help="statistics that an openpi policy uses: pi0.5 quantiles, pi0 mean_std",
    )
    parser.add_argument("--tokenizer", type=Path, help="PaliGemma's tokenizer.json; default: the checkpoint's")
    parser.add_argument("--noise-seed", type=int, default=0, help="of the bank of noises; default: %(default)s")
    return parser


def main(argv: Sequence[str]) -> int:
    """The command line of `import_pi05`."""
    args = _parser().parse_args(argv)
    settings = FlowSettings(
        args.convention,
        tuple(args.state_names),
        args.images,
        args.executed,
        args.action_dim,
        args.normalization,
        args.tokenizer,
        args.noise_seed,
    )
    config = import_pi05(args.checkpoint, args.out, settings)
    print(f"{args.out}: {'; '.join(_lines(config))}")
    return 0
