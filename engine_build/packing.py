"""Integer codes as packed bytes, in the orders of ONNX, of ONNX Runtime's MatMulNBits, and of the kernels here."""

import numpy as np

RUN = 128
"""Inputs that the kernels of this package read of a row at once; rows are filled up to whole runs."""


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


def pack_runs(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [out, in] of 2 or 4 bits as little-endian words [out, runs * 4 * bits], for kernels/quantized_matmul.cu.

    Four lanes share a run. Lane t takes inputs 32 q + 8 t .. + 7 of its blocks q = 0..3, all in `bits` adjacent words:
    a 2-bit word holds two blocks, even inputs in its lower half and odd ones in its upper half; a 4-bit word holds one
    block, inputs b and 4 + b in the lower and upper half of byte b.
    """
    outputs = len(codes)
    runs = pad_groups(codes, RUN)
    if bits == 2:  # word, block in it, lane, pair, half -> lane, word, half, block in it, pair
        ordered = runs.reshape(outputs, -1, 2, 2, 4, 4, 2).transpose(0, 1, 4, 2, 6, 3, 5)
    elif bits == 4:  # block, lane, half, byte -> lane, block, byte, half
        ordered = runs.reshape(outputs, -1, 4, 4, 2, 4).transpose(0, 1, 3, 2, 5, 4)
    else:
        raise ValueError(f"runs of {bits}-bit codes have no layout")
    return np.frombuffer(pack(np.ascontiguousarray(ordered), bits), "<i4").reshape(outputs, -1)


def pad_scales(scales: np.ndarray, inputs: int, group: int | None) -> np.ndarray:
    """Scales [out, groups] for codes in runs: with zeros for the groups that only fill up the last run."""
    if group is None:
        return scales
    groups = -(-inputs // RUN) * RUN // group
    return np.pad(scales, ((0, 0), (0, groups - scales.shape[1])))
