"""Weights, image and prompt of tests/data/golden_openvla_seed1.json, all from a seed.

The numbers in that file were computed once with the published OpenVLA modelling and processing code (float32, CPU),
with full-size vision towers and a small language model. They are the oracle for the port: nothing here calls it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"


def golden_numbers() -> dict[str, Any]:
    """The published code's inputs and outputs."""
    content: dict[str, Any] = json.loads((DATA / "golden_openvla_seed1.json").read_text())
    return content


def golden_tensor(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 weight that carries `name` in the published checkpoint's naming."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    normal = np.random.RandomState(int.from_bytes(digest[:4], "little")).standard_normal(int(np.prod(shape)))
    values = normal.astype(np.float32).reshape(shape)
    if name.endswith("scale_factor"):
        return (0.1 + 0.02 * values).astype(np.float32)
    if "norm" in name and name.endswith("weight"):
        return (1 + 0.02 * values).astype(np.float32)
    if name.endswith("bias"):
        return (0.02 * values).astype(np.float32)
    if any(part in name for part in ("embed_tokens", "pos_embed", "cls_token", "reg_token", "latent")):
        return (0.5 * values).astype(np.float32)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    return (values / np.sqrt(fan_in)).astype(np.float32)


def golden_image(seed: int) -> np.ndarray:
    """uint8 RGB, [256, 320, 3]: a ramp with noise."""
    noise = np.random.RandomState(seed).randint(0, 256, (256, 320, 3), dtype=np.uint8)
    rows, columns = np.mgrid[0:256, 0:320]
    ramp = np.stack([rows % 256, columns % 256, (rows + columns) % 256], -1)
    return (0.5 * noise + 0.5 * ramp).astype(np.uint8)
