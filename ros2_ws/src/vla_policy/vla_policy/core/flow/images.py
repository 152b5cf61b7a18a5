"""From camera images to the tower's input: the one implementation that calibration, engines and robot share.

The aspect ratio is kept; what the image does not fill is `padding`. The missing cameras of a published policy are left
out: their tokens are masked from everything, and leaving them out gives the same numbers.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vla_policy.core.errors import DataError
from vla_policy.core.flow.config import FlowConfig
from vla_policy.core.flow.conventions import Convention
from vla_policy.core.image import check_image


def pixel_values(images: Sequence[np.ndarray], config: FlowConfig) -> np.ndarray:
    """float32 [3 N, S, S] in [-1, 1]: the policy's N images, one after the other by channels.

    Raises DataError when they are not as many as the policy looks at.
    """
    if len(images) != config.num_images:
        raise DataError(f"images: the policy looks at {config.num_images}, got {len(images)}")
    return np.concatenate([preprocess(image, config.image_size, config.convention) for image in images])


def preprocess(image: np.ndarray, size: int, convention: Convention) -> np.ndarray:
    """float32 [3, S, S]: one image, resized into the square's middle."""
    check_image(image)
    height, width = image.shape[:2]
    ratio = max(height / size, width / size)
    inner = (int(height / ratio), int(width / ratio))
    resized = _antialiased(image, *inner) if convention.antialiased else _bilinear(image, *inner)
    top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    canvas = np.full((size, size, 3), convention.padding, np.float32)
    canvas[top : top + inner[0], left : left + inner[1]] = resized * np.float32(2) - np.float32(1)
    return canvas.transpose(2, 0, 1)


def _antialiased(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 in [0, 1]."""
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    return image.astype(np.float32) / np.float32(255)


def _bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 in [0, 1]: of the four nearest pixels, by centres, the positions in float32 as torch has them."""
    values = image.astype(np.float32) / np.float32(255)
    for axis, new in enumerate((height, width)):
        old = values.shape[axis]
        if old == new:
            continue
        step = float(np.float32(old) / np.float32(new))
        places = np.maximum((step * (np.arange(new) + 0.5) - 0.5).astype(np.float32), np.float32(0))
        before = np.minimum(places.astype(np.int64), old - 1)
        after = np.minimum(before + 1, old - 1)
        share = np.expand_dims((places - before).astype(np.float32), tuple({0, 1, 2} - {axis}))
        values = values.take(before, axis) * (1 - share) + values.take(after, axis) * share
    return np.clip(values, 0, 1)
