"""TFRecord files of tf.train.Example, looked at in place: a value is read where it is wanted, what lies between is not.

Framing per record: its length uint64, a checksum of that uint32, the record, a checksum of that uint32, little-endian.
An Example is a protocol buffer, {features: {name: bytes_list | float_list | int64_list}}; of its wire format only what
these messages use is known here. No kept library reads single values without the pictures beside them.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_policy.core.errors import DataError

_HEADER, _FOOTER = struct.Struct("<QI"), 4
_BYTES, _FLOATS, _INTEGERS = 1, 2, 3
_LENGTH_DELIMITED, _FIXED_32, _VARINT = 2, 5, 0
# CRC-32C, which TFRecord masks so that a checksum of checksums is none.
_POLYNOMIAL, _MASK_DELTA = 0x82F63B78, 0xA282EAD8


@dataclass(frozen=True)
class Values:
    """One feature of an Example: where its list is in the file."""

    view: memoryview
    kind: int

    def texts(self) -> Iterator[memoryview]:
        """The values of a bytes_list."""
        for _, _, value in _fields(self.view):
            yield value

    def numbers(self) -> np.ndarray:
        """float64 [n] of a float_list or int64_list, packed or not."""
        parts: list[np.ndarray] = []
        for _, wire, value in _fields(self.view):
            if self.kind == _FLOATS:
                parts.append(np.frombuffer(value, "<f4").astype(np.float64))
            elif wire == _VARINT:
                parts.append(np.asarray([_signed(_varint(value, 0)[0])], np.float64))
            else:
                parts.append(np.asarray(list(_varints(value)), np.float64))
        return np.concatenate(parts) if parts else np.zeros(0)

    def __len__(self) -> int:
        if self.kind == _BYTES:
            return sum(1 for _ in self.texts())
        return len(self.numbers())


class Shard:
    """An open TFRecord file. Raises DataError where a record is damaged or cut off."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self._path, self._view = path, view

    def offsets(self) -> Iterator[int]:
        """Where every record starts."""
        at = 0
        while at < len(self._view):
            end = self._end(at)
            yield at
            at = end + _FOOTER

    def example(self, offset: int) -> dict[str, Values]:
        """The features of the record at `offset` by name."""
        record = self._view[offset + _HEADER.size : self._end(offset)]
        try:
            return dict(_example(record))
        except (IndexError, ValueError, struct.error, UnicodeDecodeError) as error:
            raise DataError(f"{self._path}: the record at byte {offset} is no tf.train.Example ({error})") from error

    def _end(self, at: int) -> int:
        header = self._view[at : at + _HEADER.size]
        if len(header) < _HEADER.size:
            raise DataError(f"{self._path}: is cut off at byte {len(self._view)}; copy it again")
        length, checksum = _HEADER.unpack(header)
        if _masked_crc32c(header[:8]) != checksum:
            raise DataError(f"{self._path}: no TFRecord at byte {at}; it is damaged or something else: copy it again")
        end: int = at + _HEADER.size + length
        if end + _FOOTER > len(self._view):
            raise DataError(f"{self._path}: is cut off at byte {len(self._view)}, within a record; copy it again")
        return end


def open_shard(path: Path) -> Shard:
    """Maps the file; nothing of it is loaded. Raises DataError for one that is missing or empty."""
    try:
        with path.open("rb") as stream:
            # Unmapped when the last view of it is gone.
            return Shard(path, memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))
    except FileNotFoundError as error:
        raise DataError(f"{path}: is missing; the set was not copied whole") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy it again") from error


def _example(record: memoryview) -> Iterator[tuple[str, Values]]:
    for _, _, features in _fields(record):
        for _, _, entry in _fields(features):
            pair = {number: content for number, _, content in _fields(entry)}
            for kind, _, values in _fields(pair.get(2, memoryview(b""))):
                yield bytes(pair.get(1, b"")).decode(), Values(values, kind)


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Number, wire type and content of every field."""
    at = 0
    while at < len(message):
        number, wire, content, at = _field(message, at)
        yield number, wire, content


def _field(message: memoryview, at: int) -> tuple[int, int, memoryview, int]:
    """Number, wire type and content of the field at `at`, and where the next starts."""
    key, at = _varint(message, at)
    number, wire = key >> 3, key & 7
    if wire == _LENGTH_DELIMITED:
        size, at = _varint(message, at)
    elif wire == _FIXED_32:
        size = 4
    elif wire == _VARINT:
        size = _varint(message, at)[1] - at
    else:
        raise ValueError(f"wire type {wire}")
    if at + size > len(message):
        raise IndexError("a field reaches beyond its message")
    return number, wire, message[at : at + size], at + size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varints(packed: memoryview) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield _signed(value)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _table() -> list[int]:
    entries = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        entries.append(byte)
    return entries


_CRC_TABLE = _table()


def _masked_crc32c(data: memoryview) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF
