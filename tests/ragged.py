"""A random policy of odd sizes in the published layout: ragged groups, shared key/value heads."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from calibrator.allocation.plan import rows_path
from calibrator.families import save_policy
from calibrator.families.loading import empty_policy
from calibrator.quantizers import parse_choice
from calibrator.quantizers.rows import WHOLE, RowBits
from engine_build.build import Request, build
from engine_build.weights import layers_of
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import Choice
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.targets import find_target

WORDS = (
    "<unk>",
    "<s>",
    "▁",
    "In:",
    "What",
    "action",
    "should",
    "the",
    "robot",
    "take",
    "to",
    "?",
    "Out:",
    "push",
    "lift",
)
TOKEN_VOCAB = 256 + 44
KEY = "ragged"


def config_dict(images: int = 1) -> dict[str, Any]:
    tower = {"image_size": 16, "patch_size": 4, "depth": 3, "heads": 4, "registers": 0}
    names = ["x", "y", "z"]
    return {
        "model_type": "openvla",
        "vision_towers": [
            tower | {"kind": "dinov2", "width": 32, "mlp_width": 80, "registers": 4},
            tower | {"kind": "siglip", "width": 48, "mlp_width": 72},
        ],
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": TOKEN_VOCAB + 64,
            "rms_norm_eps": 1e-6,
        },
        "pad_to_multiple_of": 64,
        "n_action_bins": 256,
        "num_images_in_input": images,
        "state_in_prompt": True,
        "norm_stats": {
            KEY: {
                "action": {"q01": [-1.0, -2.0, 0.0], "q99": [1.0, 2.0, 1.0], "mask": [True, True, False]},
                "proprio": {"names": names, "q01": [-1.0] * 3, "q99": [1.0] * 3},
            }
        },
    }


def write_tokenizer(path: Path) -> None:
    """Whole words, BOS in front, as Llama's tokenizer gives them for the prompt."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))


def write_policy(folder: Path, seed: int = 0, images: int = 1) -> Path:
    """A random policy in `folder` that looks at so many images, by NumPy: the same on every processor."""
    policy = empty_policy(PolicyConfig.from_dict(config_dict(images), "ragged")).to_empty(device="cpu")
    generator = np.random.default_rng(seed)
    for name, tensor in policy.state_dict().items():
        fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
        values = torch.from_numpy(generator.standard_normal(tensor.shape, np.float32)) / fan_in**0.5
        if tensor.dim() == 1 and not name.endswith("bias"):
            values = 1 + 0.1 * values
        if name.endswith("lm_head.weight"):  # a trained policy answers with action tokens, never with words
            values[: TOKEN_VOCAB - policy.config.n_action_bins] = 0.0
            values[TOKEN_VOCAB:] = 0.0
        tensor.copy_(values)
    source = folder.with_suffix(".tokenizer")
    source.mkdir(parents=True, exist_ok=True)
    write_tokenizer(source / "tokenizer.json")
    save_policy(policy, folder, source)
    shutil.rmtree(source)
    return folder


def mixed_assignment(names: list[str], choices: list[str]) -> dict[str, Choice]:
    """The choices in turn over the layers."""
    return {name: parse_choice(choices[index % len(choices)]) for index, name in enumerate(names)}


def write_plan(path: Path, policy_sha256: str, assignment: dict[str, Choice], rows: RowBits = WHOLE) -> Path:
    entries = {name: choice.to_json() for name, choice in assignment.items()}
    plan: dict[str, Any] = {"schema_version": 2, "kind": "plan", "policy_sha256": policy_sha256, "assignment": entries}
    if rows:
        beside = rows_path(path)
        plan["rows"] = {"name": beside.name, "sha256": rows.save(beside)}
    path.write_text(json.dumps(plan))
    return path


def observation(seed: int = 0, images: int = 1) -> Observation:
    rng = np.random.default_rng(seed)
    image, *further = rng.integers(0, 256, (images, 20, 24, 3), dtype=np.uint8)
    return Observation(image, "push the robot", rng.uniform(-1, 1, 3).astype(np.float32), tuple(further))


def build_engine(folder: Path, formats: list[str], images: int = 1, backend: str | None = None) -> Path:
    """Policy, plan (the formats in turn) and CPU engine in `folder`; returns the engine's folder."""
    policy = write_policy(folder / "policy", images=images)
    assignment = mixed_assignment(list(layers_of(PolicyConfig.load(policy))), formats)
    plan = write_plan(folder / "plan.json", sha256_policy(policy), assignment)
    build(Request(policy, find_target("cpu"), folder / "engine", plan=plan, backend=backend))
    return folder / "engine"
