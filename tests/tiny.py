"""A tiny random policy in the published layout: small enough for brute force, complete enough for every code path."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from calibrator.families import find_family, save_policy
from demo.tokenizer import save_tokenizer
from vla_policy.core.policy_config import PolicyConfig

INSTRUCTIONS = ("pick up the red block", "open the drawer", "push the button")


def tiny_config(vocab: int, images: int = 1, chunk: int | None = None) -> dict[str, Any]:
    """config.json of the tiny policy: 32 px images, 4 patches each, 3 action dimensions, 2 state values.

    chunk: actions per decision of an OpenVLA-OFT policy, None for one that decides tokens.
    """
    tower = {"image_size": 32, "patch_size": 16, "width": 64, "depth": 3, "heads": 2, "mlp_width": 128}
    oft: dict[str, Any] = {}
    if chunk is not None:
        oft = {"model_type": "openvla_oft", "num_actions_chunk": chunk, "use_proprio": True, "state_in_prompt": False}
        oft["action_proprio_normalization_type"] = "bounds_q99"
    action = {"q01": [-1.0, -0.5, -1.0], "q99": [1.0, 0.5, 1.0], "mask": [True, True, False]}
    return {
        "model_type": "openvla",
        "pad_to_multiple_of": 64,
        "n_action_bins": 256,
        "image_sizes": [32, 32],
        "vision_towers": [{"kind": "dinov2", "registers": 2, **tower}, {"kind": "siglip", "registers": 0, **tower}],
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": vocab + 64,
        },
        "num_images_in_input": images,
        "state_in_prompt": True,
        "steps_per_action": 2,
        "norm_stats": {
            "tiny": {
                "action": action | {"mean": [0.1, -0.05, 0.4], "std": [0.4, 0.2, 0.5]},
                "proprio": {"names": ["x", "gripper_width"], "q01": [-1.0, 0.0], "q99": [1.0, 0.1]},
            }
        },
    } | oft


def tiny_policy_folder(folder: Path, seed: int = 0, images: int = 1, chunk: int | None = None) -> Path:
    """Writes the tiny policy with random weights of trained-like scale; returns `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = folder.parent / f"{folder.name}.tokenizer"
    source.mkdir()
    vocab = save_tokenizer(INSTRUCTIONS, source / "tokenizer.json")
    torch.manual_seed(seed)
    config = PolicyConfig.from_dict(tiny_config(vocab, images, chunk), "config.json")
    policy = find_family(config).build(config)
    # By NumPy, whose normal numbers are the same on every processor; torch's differ in the last bit.
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel() if "embed" not in name and "token" not in name else 4
                values = torch.from_numpy(generator.standard_normal(parameter.shape, np.float32))
                parameter.copy_(values * fan_in**-0.5)
            if name.endswith("lm_head.weight"):
                # A trained policy answers with action tokens, never with words.
                parameter[: vocab - config.n_action_bins] = 0.0
                parameter[vocab:] = 0.0
    save_policy(policy, folder, source)
    shutil.rmtree(source)
    return folder


def overflowing_policy_folder(folder: Path) -> Path:
    """A tiny OpenVLA-OFT policy of finite weights whose arithmetic overflows where x + 20 gripper_width > 1.34."""
    path = tiny_policy_folder(folder, chunk=4) / "model.safetensors"
    tensors = load_file(path)
    tensors["proprio_projector.fc1.weight"][0] = 1e37
    tensors["proprio_projector.fc2.weight"][:, 0] = 100.0
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def with_two_statistics(policy: Path) -> Path:
    """The policy in this folder with `large` beside `tiny`: actions ten times as large."""
    raw = json.loads((policy / "config.json").read_text())
    large = copy.deepcopy(raw["norm_stats"]["tiny"])
    for name in ("q01", "q99"):
        large["action"][name] = [10 * value for value in large["action"][name]]
    raw["norm_stats"]["large"] = large
    (policy / "config.json").write_text(json.dumps(raw))
    return policy
