"""Image messages to RGB arrays."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.core.hostile_images import HOSTILE, JPEG, PICTURE, PNG, encoded
from vla_policy.core import ros_image
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
        (RawImage(5, 7, "rgb8", 21, memoryview(bytes(106))), "expected 105 bytes, got 106"),
        (RawImage(2**32 - 1, 2**20, "rgb8", 2**32 - 1, memoryview(b"x")), "expected 18446744065119617025 bytes, got 1"),
        (RawImage(5, 7, "mono16", 14, memoryview(bytes(70))), "'mono16' is not supported"),
        (RawImage(5, 7, "bayer_rggb8", 7, memoryview(bytes(35))), "'bayer_rggb8' is not supported"),
        (RawImage(5, 7, "32FC1", 28, memoryview(bytes(140))), "'32FC1' is not supported"),
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


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_whole_8_bit_picture_is_refused(name: str) -> None:
    hostile = HOSTILE[name]
    with pytest.raises(DataError, match=re.escape(hostile.words)) as refusal:
        CompressedImage(hostile.format, memoryview(hostile.data)).decode()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", [name for name in HOSTILE if "huge" in name or "larger" in name or "two" in name])
def test_a_claim_is_refused_before_anything_is_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ros_image.Image, "open")
    with pytest.raises(DataError, match=re.escape(HOSTILE[name].words)):
        CompressedImage(HOSTILE[name].format, memoryview(HOSTILE[name].data)).decode()


@pytest.mark.parametrize(
    "text",
    ["", "png", "JPEG", "rgb8; jpeg compressed bgr8", "mono8; png compressed ", "bgra8; png compressed bgra8",
     "yuv422_yuy2; jpeg compressed bgr8", "nv21; jpeg compressed bgr8"],
)  # fmt: skip
def test_what_image_transport_writes_of_a_picture_is_taken(text: str) -> None:
    np.testing.assert_array_equal(CompressedImage(text, memoryview(PNG)).decode(), PICTURE)


def test_palettes_and_alpha_are_pictures() -> None:
    """A palette's entries are 8-bit colours, whatever the indices take; alpha is left out, as of rgba8."""
    picture = Image.fromarray(PICTURE)
    alpha = Image.fromarray(PICTURE[:, :, 0])
    clear = picture.copy()
    clear.putalpha(alpha)
    grey = Image.merge("LA", [alpha, alpha])
    few = picture.quantize(4)
    for image, expected in (
        (clear, PICTURE),
        (grey, np.repeat(PICTURE[:, :, :1], 3, 2)),
        (few, np.asarray(few.convert("RGB"))),
    ):
        options = {"transparency": bytes(4)} if image is few else {}
        data = encoded(image, "PNG", **options)
        np.testing.assert_array_equal(CompressedImage("png", memoryview(data)).decode(), expected)


def test_zeros_behind_an_image_are_padding() -> None:
    """Some drivers publish their whole buffer."""
    for data in (PNG, JPEG):
        whole, padded = (CompressedImage("", memoryview(data + bytes(count))).decode() for count in (0, 99))
        np.testing.assert_array_equal(whole, padded)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damage_is_a_refusal_or_a_picture_and_nothing_else(kind: str) -> None:
    """No bytes may raise anything but DataError: an error of another type ends the inference thread."""
    rng = np.random.default_rng(3)
    sources = [encoded(Image.fromarray(array), kind) for array in (PICTURE, PICTURE[:, :, 0])]
    refused = 0
    for _ in range(400):
        data = bytearray(sources[rng.integers(2)])
        for place in rng.integers(0, len(data), rng.choice([1, 2, 50])):
            data[place] = rng.integers(256)
        try:
            image = CompressedImage("", memoryview(data)).decode()
            assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
        except DataError:
            refused += 1
    assert refused > 0
