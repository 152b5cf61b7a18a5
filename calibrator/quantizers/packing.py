"""Integer codes as packed bytes: the first code in the lowest bits, as ONNX's INT2, INT4 and INT8 have it."""

import numpy as np


def pack(codes: np.ndarray, bits: int) -> bytes:
    """Two's-complement codes of 2, 3, 4 or 8 bits in row-major order, the first in the lowest bits of a byte.

    codes: int8, any shape. A last byte that is not full ends in zeros; codes of 3 bits cross bytes.
    """
    flat = codes.reshape(-1).view(np.uint8)
    if bits == 8:
        return flat.tobytes()
    if 8 % bits:
        lowest = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
        return np.packbits(lowest, bitorder="little").tobytes()
    per_byte = 8 // bits
    flat = flat & np.uint8((1 << bits) - 1)
    missing = -len(flat) % per_byte
    if missing:
        flat = np.concatenate([flat, np.zeros(missing, np.uint8)])
    lanes = flat.reshape(-1, per_byte)
    packed = lanes[:, 0].copy()
    for lane in range(1, per_byte):
        packed |= lanes[:, lane] << np.uint8(bits * lane)
    return packed.tobytes()


def unpack(content: bytes, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of `pack`'s result, int8 [count]."""
    stored = np.frombuffer(content, np.uint8)
    if bits == 8:
        return stored.view(np.int8)[:count].copy()
    if 8 % bits:
        lowest = np.unpackbits(stored, count=bits * count, bitorder="little").reshape(-1, bits)
        unsigned = np.packbits(lowest, axis=1, bitorder="little")[:, 0].astype(np.int16)
    else:
        lanes = [(stored >> np.uint8(bits * lane)) & np.uint8((1 << bits) - 1) for lane in range(8 // bits)]
        unsigned = np.stack(lanes, axis=1).reshape(-1)[:count].astype(np.int16)
    return np.where(unsigned >= 1 << (bits - 1), unsigned - (1 << bits), unsigned).astype(np.int8)
