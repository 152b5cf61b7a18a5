"""Bytes of `sensor_msgs` images to RGB arrays, without OpenCV and without cv_bridge.

Raw encodings follow `sensor_msgs/image_encodings`; compressed ones what `image_transport` publishes (JPEG, PNG).
"""

import io
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from vla_policy.core.errors import DataError

# Channel count, and the slice of channels that gives RGB (of one channel, repeated).
_ENCODINGS = {
    "rgb8": (3, slice(None)),
    "bgr8": (3, slice(None, None, -1)),
    "8UC3": (3, slice(None, None, -1)),  # OpenCV's default order
    "rgba8": (4, slice(0, 3)),
    "bgra8": (4, slice(2, None, -1)),
    "mono8": (1, slice(None)),
    "8UC1": (1, slice(None)),
}
_FORMATS = ("JPEG", "PNG")
_MAX_PIXELS = 1 << 26


@dataclass(frozen=True)
class RawImage:
    """A `sensor_msgs/Image` as it came: `step` bytes per row, rows possibly padded."""

    height: int
    width: int
    encoding: str
    step: int
    data: memoryview

    def decode(self) -> np.ndarray:
        """uint8 RGB [height, width, 3]. Raises DataError naming encoding and size when they do not fit."""
        if self.encoding not in _ENCODINGS:
            raise DataError(f"image encoding {self.encoding!r} is not supported; publish {', '.join(_ENCODINGS)}")
        channels, order = _ENCODINGS[self.encoding]
        size = f"{self.width}x{self.height} {self.encoding}, step {self.step}"
        if self.height < 1 or self.width < 1 or self.step < self.width * channels:
            raise DataError(
                f"image {size}: expected a step of at least {self.width * channels} bytes and both sides > 0"
            )
        if len(self.data) < self.step * self.height:
            raise DataError(f"image {size}: expected {self.step * self.height} bytes, got {len(self.data)}")
        rows = np.frombuffer(self.data, np.uint8, self.step * self.height).reshape(self.height, self.step)
        pixels = rows[:, : self.width * channels].reshape(self.height, self.width, channels)
        return np.repeat(pixels, 3, axis=2) if channels == 1 else np.ascontiguousarray(pixels[:, :, order])

    def checksum(self) -> int:
        """CRC-32 of every 61st byte: equal for a frozen camera, and cheap on the way from callback to action."""
        return zlib.crc32(np.frombuffer(self.data, np.uint8)[::61].tobytes())


@dataclass(frozen=True)
class CompressedImage:
    """A `sensor_msgs/CompressedImage` as it came; `format` is the publisher's text, only reported."""

    format: str
    data: memoryview

    def decode(self) -> np.ndarray:
        """uint8 RGB [height, width, 3]. Raises DataError when the bytes are no whole JPEG or PNG."""
        try:
            with Image.open(io.BytesIO(self.data), formats=_FORMATS) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise DataError(f"compressed image {image.width}x{image.height}: above {_MAX_PIXELS} pixels")
                return np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"compressed image ({self.format!r}, {len(self.data)} bytes): not a whole JPEG or PNG ({error})"
            ) from error

    def checksum(self) -> int:
        """CRC-32 of the bytes: equal for a frozen camera."""
        return zlib.crc32(self.data)


EncodedImage = RawImage | CompressedImage
