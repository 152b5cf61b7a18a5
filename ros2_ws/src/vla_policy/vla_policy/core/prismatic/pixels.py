"""From camera images to the towers' input: the one implementation that calibration, engines and robot share."""

from collections.abc import Sequence

import numpy as np

from vla_policy.core.errors import DataError
from vla_policy.core.image import resize
from vla_policy.core.prismatic.config import PrismaticConfig


def preprocess(image: np.ndarray, config: PrismaticConfig) -> np.ndarray:
    """float32 [6, S, S]: resized, scaled to [0, 1], normalised for DINOv2 (channels 0-2) and SigLIP (3-5)."""
    scaled = resize(image, config.image_size).astype(np.float32).transpose(2, 0, 1) / np.float32(255)
    normalised = [
        (scaled - np.asarray(tower.mean, np.float32)[:, None, None]) / np.asarray(tower.std, np.float32)[:, None, None]
        for tower in config.towers
    ]
    return np.concatenate(normalised)


def pixel_values(images: Sequence[np.ndarray], config: PrismaticConfig) -> np.ndarray:
    """float32 [6 N, S, S]: `preprocess` of each of the policy's N images, one after the other by channels.

    Raises DataError when they are not as many as the policy looks at.
    """
    if len(images) != config.num_images:
        raise DataError(f"images: the policy looks at {config.num_images}, got {len(images)}")
    return np.concatenate([preprocess(image, config) for image in images])
