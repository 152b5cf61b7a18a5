"""Bytes of `sensor_msgs` images to RGB arrays, without OpenCV and without cv_bridge: the one decoder of robot and desk.

Raw encodings follow `sensor_msgs/image_encodings`; compressed ones what `image_transport` publishes (JPEG, PNG). Images
have 8 bits per sample, grey or colour, a PNG's palette included; alpha is left out. Anything else is refused: numbers
that were cut to 8 bits, or a mosaic, look like a picture and are none that a policy has seen.

Compressed bytes are read structurally before they are decoded, so that a header that claims more than a camera gives,
or than its bytes can hold, takes no memory.
"""

import io
import re
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from PIL import Image

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
# What image_transport compresses as it is: mosaics, and numbers that 8 bits do not hold.
_NOT_A_PICTURE = re.compile(r"bayer_.*|(mono|rgba?|bgra?)16|(8S|16[US]|32[SF]|64F)C\d*|compressedDepth", re.IGNORECASE)
# Luma and chroma are converted on the way; then the format ends with what they became.
_LUMA_CHROMA = re.compile(r"yuv.*|nv\d\d|uyvy|yuyv", re.IGNORECASE)
_WANTED = f"8-bit grey or colour ({', '.join(_ENCODINGS)})"

_MAX_PIXELS = 1 << 25  # 8K video has 33.2 million
_DEFLATE_RATIO = 1032  # bytes from one, at most
_JPEG_PIXELS_PER_BYTE = 512  # at most: one bit per block of 64

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PNG_PALETTE = 3
_PNG_CHANNELS = {0: 1, 2: 3, _PNG_PALETTE: 1, 4: 2, 6: 4}  # by colour type
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # no stuffing, restart or fill byte of coded data
_JPEG_END = 0xD9
_JPEG_CHANNELS = (1, 3)  # grey, colour; four are ink
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


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
        if len(self.data) != self.step * self.height:
            raise DataError(f"image {size}: expected {self.step * self.height} bytes, got {len(self.data)}")
        rows = np.frombuffer(self.data, np.uint8).reshape(self.height, self.step)
        pixels = rows[:, : self.width * channels].reshape(self.height, self.width, channels)
        return np.repeat(pixels, 3, axis=2) if channels == 1 else np.ascontiguousarray(pixels[:, :, order])

    def checksum(self) -> int:
        """CRC-32 of every 61st byte: equal for a frozen camera, and cheap on the way from callback to action."""
        return zlib.crc32(np.frombuffer(self.data, np.uint8)[::61].tobytes())


@dataclass(frozen=True)
class CompressedImage:
    """A `sensor_msgs/CompressedImage` as it came. `format`: the publisher's text, e.g. "rgb8; jpeg compressed bgr8"."""

    format: str
    data: memoryview

    def decode(self) -> np.ndarray:
        """uint8 RGB [height, width, 3]. Raises DataError unless the bytes are a whole JPEG or PNG of a picture."""
        try:
            _check_format(self.format)
            claim = _png(self.data) if self.data[: len(_PNG)] == _PNG else _jpeg(self.data)
            claim.check(len(self.data))
            return claim.pixels(self.data)
        except DataError as error:
            raise DataError(f"compressed image ({self.format[:60]!r}, {len(self.data)} bytes): {error}") from error

    def checksum(self) -> int:
        """CRC-32 of the bytes: equal for a frozen camera."""
        return zlib.crc32(self.data)


EncodedImage = RawImage | CompressedImage


def _check_format(text: str) -> None:
    """Raises DataError where the text says that the camera's image was no picture; a codec's name says nothing."""
    words = text.replace(";", " ").split()
    for word in words:
        if _NOT_A_PICTURE.fullmatch(word) or (_LUMA_CHROMA.fullmatch(word) and words[-1] not in _ENCODINGS):
            raise DataError(f"encoding {word!r} is not supported; publish {_WANTED}")


@dataclass(frozen=True)
class _Claim:
    """The size that a compressed image's header gives. least_bytes: what an image of this size takes up at least."""

    width: int
    height: int
    least_bytes: int

    def check(self, size: int) -> None:
        """Raises DataError for an image without pixels, or with more than a camera gives or `size` bytes can hold."""
        claim = f"its header claims {self.width}x{self.height} pixels"
        if not 0 < self.width * self.height <= _MAX_PIXELS:
            raise DataError(f"{claim}; expected at least one, and at most {_MAX_PIXELS}")
        if self.least_bytes > size:
            raise _damaged(f"{claim}, which take at least {self.least_bytes} bytes")

    def pixels(self, data: memoryview) -> np.ndarray:
        """uint8 RGB [height, width, 3]."""
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                if image.size == (self.width, self.height):
                    image.info.pop("transparency", None)  # it goes with the alpha
                    return np.asarray(image.convert("RGB"))
                raise _damaged(f"two headers, {self.width}x{self.height} and {image.width}x{image.height}")
        except DataError:
            raise
        except Exception as error:  # of damaged bytes Pillow's parsers raise whatever they meet
            raise _damaged(str(error)) from error


def _check_samples(bits: int, channels: int, allowed: Collection[int]) -> None:
    if bits != 8 or channels not in allowed:
        raise DataError(f"{channels} channels of {bits} bits are not supported; publish {_WANTED}")


def _damaged(why: str) -> DataError:
    return DataError(f"not a whole JPEG or PNG ({why})")


def _png(data: memoryview) -> _Claim:
    """Reads a PNG's chunks, each against its checksum. Raises DataError unless they are one still image's."""
    place, claim = len(_PNG), None
    while place + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data) or zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise _damaged(f"chunk {name!r} is cut or altered")
        if (name == b"IHDR") != (claim is None):
            raise _damaged(f"chunk {name!r} where {'no second' if claim else 'a first'} header belongs")
        if name == b"IHDR":
            claim = _png_claim(data[place + 8 : end - 4])
        if name == b"acTL":
            raise DataError("an animation is not supported; publish one image per message")
        place = end
        if name == b"IEND" and claim is not None:
            _check_end(data, place)
            return claim
    raise _damaged("it ends early")


def _png_claim(header: memoryview) -> _Claim:
    if len(header) != 13:
        raise _damaged(f"a header of {len(header)} bytes")
    width, height, depth, colour = struct.unpack_from(">IIBB", header)
    channels = _PNG_CHANNELS.get(colour, 0)
    _check_samples(8 if colour == _PNG_PALETTE else depth, channels, _PNG_CHANNELS.values())
    return _Claim(width, height, height * (1 + width * channels * depth // 8) // _DEFLATE_RATIO)


def _jpeg(data: memoryview) -> _Claim:
    """Reads a JPEG's segments. Raises DataError unless they are one image's, from its first byte to its end."""
    if data[: len(_JPEG)] != _JPEG:
        raise _damaged(f"it begins with {bytes(data[:8]).hex(' ') or 'nothing'}")
    place, claim = len(_JPEG), None
    while (marker := _JPEG_MARKER.search(data, place)) is not None:
        kind, place = data[marker.end() - 1], marker.end()
        if kind == _JPEG_END and claim is not None:
            _check_end(data, place)
            return claim
        segment = data[place : place + int.from_bytes(data[place : place + 2], "big")]
        if kind in _JPEG_FRAMES:
            if claim is not None or len(segment) < 8:
                raise _damaged("two frames" if claim else "its frame is cut")
            bits, height, width, channels = struct.unpack_from(">BHHB", segment, 2)
            _check_samples(bits, channels, _JPEG_CHANNELS)
            claim = _Claim(width, height, width * height // _JPEG_PIXELS_PER_BYTE)
        place += len(segment)
    raise _damaged("it ends early")


def _check_end(data: memoryview, end: int) -> None:
    """Raises DataError for anything but padding behind the image: a second one, or the rest of another."""
    rest = bytes(data[end:])
    if rest.strip(b"\0"):
        raise _damaged(f"{len(rest)} bytes follow its end")
