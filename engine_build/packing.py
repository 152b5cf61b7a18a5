"""Integer codes as packed bytes, in the orders of ONNX, of ONNX Runtime's MatMulNBits, and of the kernels here."""

import numpy as np
import torch

from calibrator.quantizers.packing import pack, unpack
from engine_build.backends.base import LANE_INPUTS, LANES, RUN, SLAB


def turned(matrix: np.ndarray) -> np.ndarray:
    """A matrix of bytes transposed, in rows; several times faster than NumPy, which copies such an array bytewise."""
    result: np.ndarray = torch.from_numpy(matrix).t().contiguous().numpy()
    return result


def transpose(content: np.ndarray, bits: int, columns: int) -> bytes:
    """`pack`'s bytes of a matrix's transpose, from its own.

    content: uint8 [rows, columns * bits / 8], of 4 or 8 bits; rows of whole bytes.
    """
    if bits == 8:
        return turned(content).tobytes()
    if len(content) % 2:
        return pack(turned(unpack(content.tobytes(), bits, len(content) * columns).reshape(-1, columns)), bits)
    first, second = content[0::2], content[1::2]
    even, odd = turned(first & 0x0F | second << 4), turned(first >> 4 | second & 0xF0)
    return np.stack([even, odd], axis=1).tobytes()


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
    shifted = (blocks.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return np.frombuffer(pack(shifted, bits), np.uint8).reshape(outputs, groups, group * bits // 8)


def pack_lanes(codes: np.ndarray, bits: int, group: int | None) -> np.ndarray:
    """Codes [out, in] for quantized_linear.cpp, uint8 [blocks, in filled / (4 * parts), 64], shifted by 2^(bits - 1).

    parts: 8 / bits. A block has 16 outputs; 64 bytes hold 4 consecutive inputs of each, and in their higher bits those
    that follow. Inputs are filled up to whole groups, or to 64; what is filled up has the code of zero.
    """
    rows = np.pad(codes, ((0, -len(codes) % LANES), (0, 0)))
    filled = pad_groups(rows, group or LANE_INPUTS).reshape(len(rows), -1).astype(np.int16) + (1 << (bits - 1))
    parts = 8 // bits
    lanes = filled.astype(np.uint8).reshape(-1, LANES, filled.shape[1] // (4 * parts), parts, 4)
    ordered = np.ascontiguousarray(lanes.transpose(0, 2, 1, 4, 3))
    return np.frombuffer(pack(ordered, bits), np.uint8).reshape(*ordered.shape[:2], 4 * LANES)


def pack_lane_scales(scales: np.ndarray) -> np.ndarray:
    """Scales float16 [out, groups] for `pack_lanes`: [blocks, groups, 16], zeros for what is filled up."""
    rows = np.pad(scales, ((0, -len(scales) % LANES), (0, 0)))
    return np.ascontiguousarray(rows.reshape(-1, LANES, scales.shape[1]).transpose(0, 2, 1))


def pack_runs(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [out, in] of 2 or 4 bits as little-endian words for quantized_matmul.cu, whose head has the order.

    int32 [slabs * 16, runs * 4 * bits]: slab by slab, run by run, then what the lanes of a warp take.
    """
    runs = pad_groups(_whole_slabs(codes), RUN)
    slabs = runs.reshape(-1, 2, SLAB // 2, *runs.shape[1:])  # slab, half, row, run, input
    if bits == 2:  # input: word, block in it, lane, pair, place -> slab, run, row, lane; half, word, place, block, pair
        ordered = slabs.reshape(*slabs.shape[:4], 2, 2, 4, 4, 2).transpose(0, 3, 2, 6, 1, 4, 8, 5, 7)
    elif bits == 4:  # input: block, lane, place, byte -> slab, run, half, row, lane; block, byte, place
        ordered = slabs.reshape(*slabs.shape[:4], 4, 4, 2, 4).transpose(0, 3, 1, 2, 5, 4, 7, 6)
    else:
        raise ValueError(f"runs of {bits}-bit codes have no layout")
    return np.frombuffer(pack(np.ascontiguousarray(ordered), bits), "<i4").reshape(len(runs), -1)


def pack_scales(scales: np.ndarray, inputs: int, group: int | None) -> np.ndarray:
    """Scales float16 [out, groups] for `pack_runs`: [slabs * 16, groups], with zeros for all that is filled up.

    Slab by slab, group by group, output r beside output r + 8. group: inputs per scale, None for one per row.
    """
    filled = _whole_slabs(scales)
    if group is not None:
        groups = -(-inputs // RUN) * RUN // group
        filled = np.pad(filled, ((0, 0), (0, groups - scales.shape[1])))
    halves = filled.reshape(-1, 2, SLAB // 2, filled.shape[1])
    return np.ascontiguousarray(halves.transpose(0, 3, 2, 1)).reshape(filled.shape)


def _whole_slabs(rows: np.ndarray) -> np.ndarray:
    """Rows with zeros up to whole slabs."""
    return np.pad(rows, ((0, -len(rows) % SLAB), (0, 0)))
