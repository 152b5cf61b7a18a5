"""Image messages to RGB arrays."""

import io

import numpy as np
import pytest
from PIL import Image

from vla_policy.core.errors import DataError
from vla_policy.core.ros_image import CompressedImage, RawImage

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
ALPHA = np.full((5, 7, 1), 9, np.uint8)
MONO = RGB[:, :, :1]


@pytest.mark.parametrize(
    ("encoding", "pixels", "expected"),
    [
        ("rgb8", RGB, RGB),
        ("bgr8", RGB[:, :, ::-1], RGB),
        ("rgba8", np.concatenate([RGB, ALPHA], 2), RGB),
        ("bgra8", np.concatenate([RGB[:, :, ::-1], ALPHA], 2), RGB),
        ("mono8", MONO, np.repeat(MONO, 3, 2)),
    ],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_every_encoding_gives_rgb(encoding: str, pixels: np.ndarray, expected: np.ndarray, padding: int) -> None:
    rows = np.ascontiguousarray(pixels).reshape(5, -1)
    rows = np.concatenate([rows, np.full((5, padding), 77, np.uint8)], 1)
    image = RawImage(5, 7, encoding, rows.shape[1], memoryview(rows.tobytes()))
    np.testing.assert_array_equal(image.decode(), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (RawImage(5, 7, "yuv422", 14, memoryview(bytes(70))), "'yuv422' is not supported; publish rgb8"),
        (RawImage(5, 7, "rgb8", 20, memoryview(bytes(100))), "7x5 rgb8, step 20: expected a step of at least 21"),
        (RawImage(5, 7, "rgb8", 21, memoryview(bytes(104))), "expected 105 bytes, got 104"),
        (RawImage(0, 7, "rgb8", 21, memoryview(b"")), "both sides > 0"),
        (CompressedImage("jpeg", memoryview(b"no image at all")), "'jpeg', 15 bytes.: not a whole JPEG or PNG"),
    ],
)
def test_a_bad_image_is_named(image: RawImage | CompressedImage, message: str) -> None:
    with pytest.raises(DataError, match=message):
        image.decode()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_compressed_image_is_refused(kind: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.tile(RGB, (10, 10, 1))).save(stream, kind)
    data = stream.getvalue()
    whole = CompressedImage(kind.lower(), memoryview(data)).decode()
    assert whole.shape == (50, 70, 3)
    with pytest.raises(DataError, match="not a whole"):
        CompressedImage(kind.lower(), memoryview(data[: len(data) // 2])).decode()


def test_png_is_exact() -> None:
    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, "PNG")
    np.testing.assert_array_equal(CompressedImage("png", memoryview(stream.getvalue())).decode(), RGB)
