"""Which files an ONNX model reads besides its own, without the onnx package: a robot has only ONNX Runtime.

Large tensors of a model are in files that it names; ONNX Runtime opens them without being asked. A model is a protocol
buffer: fields of a number and a wire type, of which only those are followed that lead to a tensor (onnx.proto3).
"""

from collections.abc import Iterator
from pathlib import Path

from vla_policy.core.errors import ArtefactError

# Of each message, the fields that lead on, by number.
_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {1: "key", 2: "value"},
}
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


def external_files(path: Path) -> set[str]:
    """The names under which the model at `path` looks for data, as it gives them. Raises ArtefactError if damaged."""
    names: set[str] = set()
    waiting = [("model", memoryview(path.read_bytes()))]
    try:
        while waiting:
            kind, content = waiting.pop()
            parts = [(_FIELDS[kind][number], part) for number, part in _fields(content) if number in _FIELDS[kind]]
            if kind == "entry":
                entry = {name: bytes(part).decode() for name, part in parts}
                names |= {entry.get("value", "")} if entry.get("key") == "location" else set()
            else:
                waiting += parts
    except (IndexError, ValueError) as error:
        raise ArtefactError(f"{path}: not an ONNX model ({error}); build the engine again") from error
    return names


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of a message's fields that have a length. Raises IndexError or ValueError for other bytes."""
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        wire = tag & 7
        if wire == _VARINT:
            _, place = _varint(content, place)
        elif wire == _BYTES:
            length, start = _varint(content, place)
            place = start + length
            yield tag >> 3, content[start:place]
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            place += 8 if wire == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"wire type {wire}")
        if place > len(content):
            raise ValueError("it ends early")


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    """A number of seven bits per byte, lowest first, and the place behind it."""
    value = shift = 0
    while True:
        byte = content[place]
        value, shift, place = value | (byte & 0x7F) << shift, shift + 7, place + 1
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise ValueError("a number without an end")
