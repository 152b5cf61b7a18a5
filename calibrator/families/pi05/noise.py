"""The bank of noises of a policy folder, drawn once: no random generator runs on a robot."""

import numpy as np

from vla_policy.core.flow.config import FlowConfig

_ENTRIES = 64


def draw_bank(config: FlowConfig, seed: int = 0) -> np.ndarray:
    """float32 [64, H, A] of the standard normal distribution."""
    shape = (_ENTRIES, config.horizon, config.width)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
