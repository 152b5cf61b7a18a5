"""Tiny random policies, pi0.5 and pi0: small enough to test every way through, with padded actions and state."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

INSTRUCTIONS = ("pick up the red block", "open the drawer", "push the button")
KEY = "tiny"
PI0: dict[str, Any] = {"variant": "pi0", "state_in_prompt": False, "normalization": "mean_std", "max_state_dim": 6}
"""What a tiny pi0 has otherwise."""


def tokenizer_of_words(sentences: Sequence[str], folder: Path) -> Tokenizer:
    """Writes `folder/tokenizer.json`: whole words behind <bos>, the line end a word of its own."""
    words = [word for text in sentences for word in text.replace("\n", " \n ").split(" ")]
    known = dict.fromkeys(["<pad>", "<eos>", "<bos>", "<unk>", "\n", *filter(None, words)])
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace("\n", " \n ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def tiny_config(images: int = 1, **changes: Any) -> dict[str, Any]:
    """config.json: 32 px images, 4 patches each, chunks of 4 rows of which 2 count, 3 of 5 action dimensions real."""
    heads = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return {
        "model_type": "pi05",
        "convention": "openpi",
        "normalization": "quantiles",
        "vision_config": {
            "image_size": 32, "patch_size": 16, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 128,
        },
        "text_config": {"hidden_size": 64, "intermediate_size": 128, **heads},
        "expert_config": {"hidden_size": 64, "intermediate_size": 64, **heads},
        "vocab_size": 576,
        "chunk_size": 4,
        "n_action_steps": 2,
        "max_action_dim": 5,
        "num_inference_steps": 3,
        "num_images_in_input": images,
        "state_in_prompt": True,
        "norm_stats": {
            KEY: {
                "action": {
                    "q01": [-1.0, -0.5, -1.0], "q99": [1.0, 0.5, 1.0],
                    "mean": [0.1, -0.05, 0.4], "std": [0.4, 0.2, 0.5],
                },
                "proprio": {
                    "names": ["x", "gripper_width"], "q01": [-1.0, 0.0], "q99": [1.0, 0.1],
                    "mean": [0.1, 0.04], "std": [0.5, 0.03],
                },
            }
        },
    } | changes  # fmt: skip


def tiny_pi05_folder(folder: Path, seed: int = 0, images: int = 1, **changes: Any) -> Path:
    """Writes the tiny policy with random weights of trained-like scale; returns `folder`."""
    import torch
    from safetensors.torch import save_file

    from calibrator.families.loading import empty_policy
    from calibrator.families.pi05.noise import draw_bank
    from vla_policy.core.policy_config import PolicyConfig

    folder.mkdir(parents=True)
    raw = tiny_config(images, **changes)
    config = PolicyConfig.from_dict(raw, "config.json")
    generator = np.random.default_rng(seed)
    state = {}
    for name, tensor in empty_policy(config).state_dict().items():
        shape = tuple(tensor.shape)
        scale = shape[-1] ** -0.5 if len(shape) == 2 else int(np.prod(shape[1:])) ** -0.5 if len(shape) > 2 else 0.1
        values = torch.from_numpy(generator.standard_normal(shape, np.float32)) * scale
        layer_norm = "norm" in name and name.endswith("weight") and "vision_tower" in name
        # bfloat16, as published: an engine's 16 bits lose nothing of it.
        state[name] = (values + 1 if layer_norm else values).to(torch.bfloat16).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    numbers = [str(number) for number in range(-1, 256)]
    tokenizer_of_words([*INSTRUCTIONS, "Task: State:", *numbers, *(f"{n};" for n in numbers), "Action:"], folder)
    np.save(folder / "noise.npy", draw_bank(config))  # type: ignore[arg-type]
    return folder
