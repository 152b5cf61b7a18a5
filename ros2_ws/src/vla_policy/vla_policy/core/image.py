"""Camera images: checks, resizing, turning and cropping, the same for calibration, engines and robot."""

import numpy as np
from PIL import Image

from vla_policy.core.errors import DataError

_BILINEAR, _BICUBIC = 2, 3  # as in PIL.Image.Resampling, which Pillow has from 9.1; Ubuntu 22.04 gives 9.0


def check_image(image: np.ndarray) -> None:
    """Raises DataError unless `image` is uint8 RGB [height, width, 3]."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"image: expected uint8 RGB of shape [height, width, 3], got {got}")


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bicubic resize to [size, size, 3], aspect ratio ignored ("resize-naive"). uint8 in and out."""
    check_image(image)
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), _BICUBIC))


def rotate_180(image: np.ndarray) -> np.ndarray:
    """The image turned by 180 degrees, as OpenVLA's LIBERO data were."""
    check_image(image)
    return np.ascontiguousarray(image[::-1, ::-1])


def centre_crop(image: np.ndarray, area: float = 0.9) -> np.ndarray:
    """The centre with `area` of the image's area, resized back: what policies trained with random crops expect."""
    check_image(image)
    if not 0 < area <= 1:
        raise DataError(f"centre crop: area must lie in (0, 1], got {area}")
    height, width = image.shape[:2]
    margin_y, margin_x = (side * (1 - area**0.5) / 2 for side in (height, width))
    box = (margin_x, margin_y, width - margin_x, height - margin_y)
    return np.asarray(Image.fromarray(image).resize((width, height), _BILINEAR, box=box))
