"""Compressed images that are no 8-bit pictures, damaged, or larger than they can be, with words of their refusal."""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

SIDE = 32
PICTURE = np.random.default_rng(5).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


@dataclass(frozen=True)
class Hostile:
    """A `CompressedImage`'s fields, and words of its refusal."""

    data: bytes
    words: str
    format: str = "png"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int = 8, colour: int = 2, scanlines: bytes = b"") -> bytes:
    """A PNG of these header fields; Pillow cannot write them all."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")


def jpeg(width: int = SIDE, height: int = SIDE, bits: int = 8) -> bytes:
    """The picture's JPEG under a frame header of these fields."""
    data = bytearray(JPEG)
    frame = data.index(b"\xff\xc0") + 4
    data[frame : frame + 5] = struct.pack(">BHH", bits, height, width)
    return bytes(data)


PNG, JPEG = (encoded(Image.fromarray(PICTURE), kind) for kind in ("PNG", "JPEG"))
_TWO = PNG.replace(PNG[8:33], PNG[8:33] + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)))
_ALTERED = bytearray(PNG)
_ALTERED[len(PNG) // 2] ^= 1
_ANIMATED = encoded(Image.fromarray(PICTURE), "PNG", save_all=True, append_images=[Image.fromarray(PICTURE[::-1])])
_PAIR = encoded(Image.fromarray(PICTURE), "MPO", save_all=True, append_images=[Image.fromarray(PICTURE[::-1])])

HOSTILE = {
    # Not 8-bit grey or colour, by the bytes.
    "grey of 16 bits": Hostile(
        encoded(Image.fromarray(PICTURE[:, :, 0].astype(np.uint16) * 257), "PNG"), "1 channels of 16 bits"
    ),
    "colour of 16 bits": Hostile(png(2, 2, 16, 2, bytes(26)), "3 channels of 16 bits are not supported; publish 8-bit"),
    "colour of 16 bits with alpha": Hostile(png(2, 2, 16, 6, bytes(34)), "4 channels of 16 bits"),
    "grey of 1 bit": Hostile(encoded(Image.fromarray(PICTURE[:, :, 0] > 99), "PNG"), "1 channels of 1 bits"),
    "JPEG of 12 bits": Hostile(jpeg(bits=12), "3 channels of 12 bits", "jpeg"),
    "ink": Hostile(encoded(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"), "4 channels of 8 bits", "jpeg"),
    # The same by what the publisher says.
    "depth": Hostile(JPEG, "encoding '16UC1' is not supported; publish 8-bit", "16UC1; png compressed "),
    "compressed depth": Hostile(PNG, "encoding '32FC1'", "32FC1; compressedDepth png"),
    "grey of 16 bits cut to 8": Hostile(JPEG, "encoding 'mono16'", "mono16; jpeg compressed "),
    "colour of 16 bits cut to 8": Hostile(JPEG, "encoding 'rgb16'", "rgb16; jpeg compressed bgr8"),
    "mosaic": Hostile(JPEG, "encoding 'bayer_rggb8'", "bayer_rggb8; jpeg compressed bgr8"),
    "mosaic of 16 bits": Hostile(PNG, "encoding 'bayer_grbg16'", "bayer_grbg16;png"),
    "luma and chroma": Hostile(JPEG, "encoding 'yuv422'", "yuv422; jpeg compressed "),
    # Claims that would take gigabytes, or that the bytes cannot hold.
    "huge PNG": Hostile(png(30000, 30000), "its header claims 30000x30000 pixels"),
    "huge JPEG": Hostile(jpeg(65500, 65500), "its header claims 65500x65500 pixels", "jpeg"),
    "PNG larger than its bytes": Hostile(png(6000, 5000), "claims 6000x5000 pixels, which take at least 87214 bytes"),
    "JPEG larger than its bytes": Hostile(jpeg(6000, 5000), "claims 6000x5000 pixels, which take", "jpeg"),
    "no pixels": Hostile(jpeg(SIDE, 0), "claims 32x0 pixels; expected at least one", "jpeg"),
    "two headers": Hostile(_TWO, "chunk b'IHDR' where no second header belongs"),
    # Not one whole image.
    "nothing": Hostile(b"", "not a whole JPEG or PNG (it begins with nothing)"),
    "cut PNG": Hostile(PNG[: len(PNG) // 2], "not a whole JPEG or PNG (chunk b'IDAT' is cut or altered)"),
    "altered PNG": Hostile(bytes(_ALTERED), "chunk b'IDAT' is cut or altered"),
    "PNG without its end": Hostile(PNG[:-12], "not a whole JPEG or PNG (it ends early)"),
    "PNG without its scanlines": Hostile(png(SIDE, SIDE, scanlines=bytes(9)), "not a whole JPEG or PNG (image file"),
    "cut JPEG": Hostile(JPEG[: len(JPEG) // 2], "not a whole JPEG or PNG (it ends early)", "jpeg"),
    "JPEG without its end": Hostile(JPEG[:-2], "not a whole JPEG or PNG (it ends early)", "jpeg"),
    "garbage behind a PNG": Hostile(PNG + b"garbage", "7 bytes follow its end"),
    "two JPEGs": Hostile(2 * JPEG, f"{len(JPEG)} bytes follow its end", "jpeg"),
    "two views": Hostile(_PAIR, "bytes follow its end", "jpeg"),
    "animation": Hostile(_ANIMATED, "an animation is not supported"),
    # What other codecs write.
    "GIF": Hostile(encoded(Image.fromarray(PICTURE), "GIF"), "it begins with 47 49 46 38"),
    "WebP": Hostile(encoded(Image.fromarray(PICTURE), "WEBP"), "it begins with 52 49 46 46"),
    "TIFF": Hostile(encoded(Image.fromarray(PICTURE), "TIFF"), "it begins with 49 49 2a 00"),
    "JPEG XL": Hostile(b"\xff\x0a" + bytes(50), "it begins with ff 0a", "jxl"),
}
