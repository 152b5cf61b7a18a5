"""From camera images to the towers' input: the one implementation that calibration, engines and robot share."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from vla_policy.core.errors import DataError
from vla_policy.core.image import resize
from vla_policy.core.prismatic.config import PrismaticConfig


def preprocess(image: np.ndarray, config: PrismaticConfig) -> np.ndarray:
    """float32 [6, S, S]: resized, scaled to [0, 1], normalised for DINOv2 (channels 0-2) and SigLIP (3-5)."""
    channels = np.ascontiguousarray(resize(image, config.image_size).transpose(2, 0, 1))
    pixels = np.empty((2 * len(channels), *channels.shape[1:]), np.float32)
    for first, tower in zip((0, len(channels)), config.towers, strict=True):
        for channel, values in enumerate(_normalised(tuple(tower.mean), tuple(tower.std))):
            np.take(values, channels[channel], out=pixels[first + channel], mode="clip")  # "raise" would copy `out`
    return pixels


@cache
def _normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """float32 [3, 256]: what each of the 256 values of a channel becomes; the same arithmetic, carried out once."""
    scaled = np.arange(256).astype(np.float32) / np.float32(255)
    values: np.ndarray = (scaled - np.asarray(mean, np.float32)[:, None]) / np.asarray(std, np.float32)[:, None]
    return values


def pixel_values(images: Sequence[np.ndarray], config: PrismaticConfig) -> np.ndarray:
    """float32 [6 N, S, S]: `preprocess` of each of the policy's N images, one after the other by channels.

    Raises DataError when they are not as many as the policy looks at.
    """
    if len(images) != config.num_images:
        raise DataError(f"images: the policy looks at {config.num_images}, got {len(images)}")
    return np.concatenate([preprocess(image, config) for image in images])
