"""Packed bytes against the layouts written out by hand."""

import numpy as np
import pytest

from calibrator.quantizers.packing import pack, unpack
from engine_build.packing import pack_nbits, pad_groups, transpose


def test_first_code_sits_in_the_lowest_bits() -> None:
    assert pack(np.array([1, -1, 0, -2], np.int8), 2) == bytes([0b10_00_11_01])
    assert pack(np.array([3, -8, 7], np.int8), 4) == bytes([0x83, 0x07])
    assert pack(np.array([-128, 5], np.int8), 8) == bytes([0x80, 0x05])
    assert pack(np.array([1, -1, 3, -4], np.int8), 3) == bytes([0b11_111_001, 0b0000_100_0])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_unpack_inverts_pack(bits: int, count: int) -> None:
    codes = np.random.default_rng(count).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), count).astype(np.int8)
    content = pack(codes, bits)
    assert len(content) == -(-count * bits // 8)
    np.testing.assert_array_equal(unpack(content, bits, count), codes)


@pytest.mark.parametrize(("bits", "rows", "columns"), [(8, 3, 5), (4, 6, 4), (4, 5, 6), (4, 1, 2)])
def test_packed_bytes_are_transposed(bits: int, rows: int, columns: int) -> None:
    codes = np.random.default_rng(rows).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns)).astype(np.int8)
    stored = np.frombuffer(pack(codes, bits), np.uint8).reshape(rows, -1)
    assert transpose(stored.copy(), bits, columns) == pack(np.ascontiguousarray(codes.T), bits)


def test_groups_are_filled_up_with_zeros() -> None:
    blocks = pad_groups(np.arange(1, 11, dtype=np.int8).reshape(2, 5), 4)
    assert blocks.tolist() == [[[1, 2, 3, 4], [5, 0, 0, 0]], [[6, 7, 8, 9], [10, 0, 0, 0]]]


def test_nbits_codes_are_shifted_to_unsigned() -> None:
    packed = pack_nbits(np.array([[-8, 7, 0, 1]], np.int8), 4, 4)
    assert packed.shape == (1, 1, 2)
    assert packed.tolist() == [[[0xF0, 0x98]]]
