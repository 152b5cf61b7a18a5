"""Weights, images, prompt, state and noise of tests/data/golden_pi0*.json, all from a seed.

The numbers in those files were computed once with the published openpi code (float32, CPU) at the sizes of their
`config`. They are the oracle for the port: nothing here calls it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"
_AT_ONCE = 1 << 16
_GEMMA_NORMS = (
    "input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight", "language_model.norm.weight"
)  # fmt: skip
"""They multiply by 1 + weight."""
EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
_TIED = {"paligemma_with_expert.paligemma.lm_head.weight": EMBEDDING}


def golden(name: str) -> dict[str, Any]:
    """The published code's inputs and outputs."""
    content: dict[str, Any] = json.loads((DATA / f"golden_{name}.json").read_text())
    return content


def normal(key: str, shape: tuple[int, ...]) -> np.ndarray:
    digest = hashlib.sha256(key.encode()).digest()
    generator = np.random.RandomState(int.from_bytes(digest[:4], "little"))
    values = np.empty(int(np.prod(shape)), np.float32)
    for begin in range(0, len(values), _AT_ONCE):  # float64 of what fits into the cache, not of a whole weight
        part = values[begin : begin + _AT_ONCE]
        part[:] = generator.standard_normal(len(part))
    return values.reshape(shape)


def golden_tensor(name: str, shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """The float32 weight that carries `name` in openpi's naming."""
    name = _TIED.get(name, name)
    values = normal(f"{seed}:{name}", shape)
    values *= np.float32(_scale(name, shape))
    if "norm" in name and name.endswith("weight") and not name.endswith(_GEMMA_NORMS) and ".dense." not in name:
        values += 1
    return values


def _scale(name: str, shape: tuple[int, ...]) -> float:
    """The standard deviation of a weight's numbers."""
    if ".dense." in name:
        return 0.1 if name.endswith("bias") else 2 * shape[1] ** -0.5
    if name.endswith(_GEMMA_NORMS):
        return 0.1
    if ("norm" in name and name.endswith("weight")) or name.endswith("bias"):
        return 0.02
    if "embed_tokens" in name or "position_embedding" in name:
        return 0.5
    if name.endswith(("q_proj.weight", "k_proj.weight")) and "vision_tower" not in name:
        return 1.5 * shape[1] ** -0.5
    return int(np.prod(shape[1:])) ** -0.5 if len(shape) > 1 else 1


def golden_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Of all names; drawing numbers takes most of these tests' time, and leaves Python to other threads."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(shapes, pool.map(golden_tensor, shapes, shapes.values()), strict=True))


def golden_state() -> np.ndarray:
    """Normalised, float32 [8]; pi0's network reads it."""
    return np.tanh(normal("1:state", (8,))).astype(np.float32)


def golden_image(seed: int, height: int = 256, width: int = 320) -> np.ndarray:
    """uint8 RGB [height, width, 3]."""
    noise = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    rows, columns = np.mgrid[0:height, 0:width]
    ramp = np.stack([rows % 256, columns % 256, (rows + columns) % 256], -1)
    return (0.5 * noise + 0.5 * ramp).astype(np.uint8)


def golden_images() -> dict[str, np.ndarray]:
    """The base camera is wider than high, the left wrist's higher than wide."""
    return {"base_0_rgb": golden_image(1), "left_wrist_0_rgb": golden_image(101, 300, 200)}


def golden_config(content: dict[str, Any], images: int, convention: str = "openpi", **changes: Any) -> dict[str, Any]:
    """The config.json of a policy folder with the sizes of a golden file's `config`."""
    sizes = content["config"]
    vision, vlm, expert = sizes["vision"], sizes["vlm"], sizes["action_expert"]

    def gemma(part: dict[str, Any]) -> dict[str, Any]:
        return {
            "hidden_size": part["width"],
            "intermediate_size": part["mlp_dim"],
            "num_hidden_layers": part["depth"],
            "num_attention_heads": part["num_heads"],
            "num_key_value_heads": part["num_kv_heads"],
            "head_dim": part["head_dim"],
        }

    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    io = golden("pi05_io")
    state = io["state_stats"] | {"names": [f"s{number}" for number in range(8)]}
    return {
        "model_type": "pi05",
        "variant": content["model"],
        "convention": convention,
        "normalization": "quantiles",
        "vision_config": {name: vision[name] for name in names},
        "text_config": gemma(vlm),
        "expert_config": gemma(expert),
        "vocab_size": sizes["vocab_size"],
        "chunk_size": sizes["action_horizon"],
        "n_action_steps": 5,
        "max_action_dim": sizes["action_dim"],
        "num_images_in_input": images,
        "state_in_prompt": content["model"] == "pi05",
        "norm_stats": {"golden": {"action": io["action_stats"], "proprio": state}},
    } | changes


def assert_matches(got: Any, wanted: dict[str, Any]) -> None:
    """Every recorded statistic to 1e-3 of the tensor's own scale; the recorded elements likewise."""
    values = np.asarray(got, np.float64)
    assert list(values.shape) == wanted["shape"]
    scale = wanted["std"]
    np.testing.assert_allclose(values.mean(), wanted["mean"], atol=1e-3 * scale)
    np.testing.assert_allclose(values.std(), scale, rtol=1e-3)
    np.testing.assert_allclose(np.abs(values).max(), wanted["abs_max"], rtol=1e-3)
    np.testing.assert_allclose(values.ravel()[:8], wanted["first8"], rtol=1e-3, atol=1e-3 * scale)
    np.testing.assert_allclose(values.ravel()[-8:], wanted["last8"], rtol=1e-3, atol=1e-3 * scale)
