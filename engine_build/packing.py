"""Integer codes as packed bytes, in ONNX's order and in that of ONNX Runtime's MatMulNBits."""

import numpy as np


def pack(codes: np.ndarray, bits: int) -> bytes:
    """Two's-complement codes in row-major order, the first in the lowest bits of a byte (ONNX INT2, INT4, INT8).

    codes: int8, any shape. A last byte that is not full ends in zeros.
    """
    flat = codes.reshape(-1).view(np.uint8)
    if bits == 8:
        return flat.tobytes()
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
    lanes = [(stored >> np.uint8(bits * lane)) & np.uint8((1 << bits) - 1) for lane in range(8 // bits)]
    unsigned = np.stack(lanes, axis=1).reshape(-1)[:count].astype(np.int16)
    return np.where(unsigned >= 1 << (bits - 1), unsigned - (1 << bits), unsigned).astype(np.int8)


def pad_groups(codes: np.ndarray, group: int) -> np.ndarray:
    """Codes [out, in] with zeros up to whole groups, as [out, groups, group]."""
    outputs, inputs = codes.shape
    missing = -inputs % group
    if missing:
        codes = np.concatenate([codes, np.zeros((outputs, missing), codes.dtype)], axis=1)
    return codes.reshape(outputs, -1, group)


def pack_nbits(codes: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Codes [out, in] as MatMulNBits' B, uint8 [out, groups, group * bits / 8]: shifted by 2^(bits - 1), its zero."""
    blocks = pad_groups(codes, group)
    outputs, groups, _ = blocks.shape
    shifted = (blocks + np.int8(1 << (bits - 1))).astype(np.int8)
    return np.frombuffer(pack(shifted, bits), np.uint8).reshape(outputs, groups, group * bits // 8)
