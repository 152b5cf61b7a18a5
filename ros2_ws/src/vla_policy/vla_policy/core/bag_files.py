"""The files of a bag, MCAP and SQLite: their channels, and the messages of the wanted ones in order of time.

Read here and not by the bag library, whose readers interpret every channel of a file before they give any: one topic of
a foreign encoding, of a type that cannot be parsed or of odd quality of service, and nothing of the bag can be read.
Here only names are decoded until a channel is asked for. MCAP as in https://mcap.dev/spec; SQLite as rosbag2 writes it.
"""

import heapq
import os
import sqlite3
import struct
import sys
import zlib
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol
from urllib.parse import quote

import lz4.frame

from vla_policy.core.errors import ContractError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MCAP, SQLITE = ".mcap", ".db3"
_MAGIC = b"\x89MCAP0\r\n"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_FOOTER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK = range(2, 7)
_RECORD = struct.Struct("<BQ")
_MESSAGE_HEAD = struct.Struct("<HIQQ")
_CHUNK_HEAD = struct.Struct("<QQQI")
# What codecs and databases raise on bytes that are not whole is of no one class: lz4 raises RuntimeError, zstd an error
# of its own, EOFError or ValueError, and a size that was overwritten can be more memory than there is.
_DAMAGE = (OSError, EOFError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError)
_DAMAGE_OF_LIBRARIES = (struct.error, sqlite3.Error, zstd.ZstdError)


@dataclass(frozen=True)
class Channel:
    """One publisher's messages in one file; nothing but its names is interpreted.

    type: such as "sensor_msgs/msg/Image"; empty where the file has none. encoding: of the messages, "cdr" for ROS 2.
    language, definition: the type's text and what it is written in, both empty where the file has no text.
    qos: the YAML list of offered profiles, empty where none was recorded.
    """

    id: int
    topic: str
    type: str
    encoding: str
    language: str
    definition: str
    qos: str


class Message(NamedTuple):
    """A message as it was on the wire, and when it was recorded."""

    time_ns: int
    channel: Channel
    data: bytes


class BagFile(Protocol):
    """One open file."""

    channels: tuple[Channel, ...]

    def messages(self, channels: Collection[Channel]) -> Iterator[Message]:
        """Those of `channels` in order of recorded time. Raises ContractError where the file is damaged."""
        ...


@contextmanager
def open_file(path: Path) -> Iterator[BagFile]:
    """The open MCAP or SQLite file. Raises ContractError for another one, and for one that is damaged or cut off."""
    with _telling(path):
        if path.suffix == MCAP:
            stream: BinaryIO | sqlite3.Connection = path.open("rb")
        else:
            # Immutable: a read-only disk will do. Beside a write-ahead log SQLite must look for itself.
            mode = "ro" if path.with_name(f"{path.name}-wal").exists() else "ro&immutable=1"
            stream = sqlite3.connect(f"file:{quote(str(path))}?mode={mode}", uri=True)
    with closing(stream):
        with _telling(path):
            file = _SqliteFile(path, stream) if isinstance(stream, sqlite3.Connection) else _McapFile(path, stream)
        yield file


def unpack_file(path: Path, target: Path) -> None:
    """Decompresses a whole file. Raises ContractError where it is damaged or the disk is full."""
    with _telling(path), zstd.open(path, "rb") as packed, target.open("wb") as plain:
        while block := packed.read(1 << 20):
            plain.write(block)


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """What damage raises, as one error that names the file."""
    try:
        yield
    except (*_DAMAGE, *_DAMAGE_OF_LIBRARIES) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or repr(error)
        raise ContractError(f"{path}: not a readable ROS 2 bag ({reason}); record or copy it again") from error


def _unpacked(data: bytes) -> bytes:
    """A message that was compressed by itself: no CDR message begins as zstd does."""
    return zstd.decompress(data) if data.startswith(_ZSTD_MAGIC) else data


class _SqliteFile:
    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        self._path, self._database = path, database
        database.text_factory = lambda text: text.decode(errors="replace")
        columns = {row[1] for row in database.execute("PRAGMA table_info(topics)")}
        if not {"id", "name", "type", "serialization_format"} <= columns:
            raise ValueError("it has no table of topics")
        definitions: dict[str, tuple[str, str]] = {}
        if database.execute("PRAGMA table_info(message_definitions)").fetchone():
            query = "SELECT topic_type, encoding, encoded_message_definition FROM message_definitions"
            definitions = {kind: (language, text) for kind, language, text in database.execute(query)}
        qos = "offered_qos_profiles" if "offered_qos_profiles" in columns else "''"
        query = f"SELECT id, name, type, serialization_format, {qos} FROM topics ORDER BY id"
        self.channels = tuple(
            Channel(number, *(str(text or "") for text in (*names, *definitions.get(names[1], ("", "")), profiles)))
            for number, *names, profiles in database.execute(query)
        )

    def messages(self, channels: Collection[Channel]) -> Iterator[Message]:
        by_id = {channel.id: channel for channel in channels}
        wanted = ", ".join("?" * len(by_id))
        query = f"SELECT timestamp, topic_id, data FROM messages WHERE topic_id IN ({wanted}) ORDER BY timestamp, id"
        with _telling(self._path):
            for time_ns, number, data in self._database.execute(query, tuple(by_id)):
                yield Message(time_ns, by_id[number], _unpacked(bytes(data)))


class _Cursor:
    """Reads a record's fields one after another."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, bits: int) -> int:
        return int.from_bytes(self.take(bits // 8), "little")

    def block(self) -> bytes:
        """Bytes with their length before them."""
        return self.take(self.number(32))

    def text(self) -> str:
        return self.block().decode(errors="replace")

    def take(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        if len(part) < size:
            raise ValueError("a record is shorter than it says")
        self._at += size
        return part

    def __bool__(self) -> bool:
        return self._at < len(self._data)


@dataclass(frozen=True)
class _Chunk:
    """Where a chunk's messages lie. `size`: of the compressed bytes at `offset`; `crc`: 0 where there is none."""

    start_ns: int
    offset: int
    size: int
    plain_size: int
    compression: str
    crc: int


class _McapFile:
    """Found by one walk over the records: a summary at the end may be missing, and need not tell everything."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path, self._stream = path, stream
        self._schemas: dict[int, tuple[str, str, str]] = {}
        self._channels: dict[int, Channel] = {}
        self._chunks: list[_Chunk] = []
        self._single: list[tuple[int, int, int, int]] = []  # outside of chunks: time, channel, offset, size
        self._walk()
        if not self._channels:  # declared inside the chunks only
            for chunk in self._chunks:
                for _ in self._records(chunk):
                    pass
        self._chunks.sort(key=lambda chunk: chunk.start_ns)
        self._single.sort()
        self.channels = tuple(self._channels.values())

    def messages(self, channels: Collection[Channel]) -> Iterator[Message]:
        ids = {channel.id for channel in channels}
        with _telling(self._path):
            yield from heapq.merge(
                self._single_messages(ids), self._chunk_messages(ids), key=lambda message: message.time_ns
            )

    def _walk(self) -> None:
        size = os.fstat(self._stream.fileno()).st_size
        if self._stream.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("it does not begin as an MCAP file does")
        at, opcode = len(_MAGIC), 0
        while opcode != _FOOTER:
            head = self._stream.read(_RECORD.size)
            opcode, length = _RECORD.unpack(head) if len(head) == _RECORD.size else (0, size)
            begin, at = at + _RECORD.size, at + _RECORD.size + length
            if at > size:
                raise ValueError(f"it is cut off: the record at byte {begin - _RECORD.size} is not whole")
            self._note(opcode, begin, length)
            self._stream.seek(at)
        if self._stream.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("it does not end as an MCAP file does")

    def _note(self, opcode: int, begin: int, length: int) -> None:
        """Looks at the record whose content begins here, as far as it must."""
        if opcode == 0:
            raise ValueError(f"the record at byte {begin - _RECORD.size} is damaged")
        if opcode in (_SCHEMA, _CHANNEL):
            self._declare(opcode, self._stream.read(length))
        elif opcode == _MESSAGE:
            channel, _, time_ns, _ = _MESSAGE_HEAD.unpack(self._stream.read(_MESSAGE_HEAD.size))
            self._single.append((time_ns, channel, begin + _MESSAGE_HEAD.size, length - _MESSAGE_HEAD.size))
        elif opcode == _CHUNK:
            start_ns, _, plain_size, crc = _CHUNK_HEAD.unpack(self._stream.read(_CHUNK_HEAD.size))
            name = self._stream.read(struct.unpack("<I", self._stream.read(4))[0])
            (packed,) = struct.unpack("<Q", self._stream.read(8))
            offset = self._stream.tell()
            if offset + packed > begin + length:
                raise ValueError(f"the chunk at byte {begin - _RECORD.size} is damaged")
            self._chunks.append(_Chunk(start_ns, offset, packed, plain_size, name.decode(errors="replace"), crc))

    def _declare(self, opcode: int, content: bytes) -> None:
        cursor = _Cursor(content)
        number = cursor.number(16)
        if opcode == _SCHEMA:
            self._schemas.setdefault(number, (cursor.text(), cursor.text(), cursor.text()))
            return
        kind, language, definition = self._schemas.get(cursor.number(16), ("", "", ""))
        topic, encoding, pairs = cursor.text(), cursor.text(), _Cursor(cursor.block())
        facts: dict[str, str] = {}
        while pairs:
            facts |= {pairs.text(): pairs.text()}
        qos = facts.get("offered_qos_profiles", "")
        # Declared again before the chunks that use it; it must be the same.
        self._channels.setdefault(number, Channel(number, topic, kind, encoding, language, definition, qos))

    def _single_messages(self, ids: set[int]) -> Iterator[Message]:
        for time_ns, channel, offset, size in self._single:
            if channel in ids:
                self._stream.seek(offset)
                yield Message(time_ns, self._channels[channel], _unpacked(self._stream.read(size)))

    def _chunk_messages(self, ids: set[int]) -> Iterator[Message]:
        """Chunks may overlap in time: a message waits until no later chunk can hold an earlier one."""
        waiting: list[tuple[int, int, int, bytes]] = []  # a heap: time, place in the file, channel, data
        place = 0
        for chunk in self._chunks:
            while waiting and waiting[0][0] < chunk.start_ns:
                yield self._message(*heapq.heappop(waiting))
            for time_ns, channel, data in self._records(chunk):
                if channel in ids:
                    heapq.heappush(waiting, (time_ns, place, channel, data))
                    place += 1
        while waiting:
            yield self._message(*heapq.heappop(waiting))

    def _message(self, time_ns: int, place: int, channel: int, data: bytes) -> Message:
        return Message(time_ns, self._channels[channel], _unpacked(data))

    def _records(self, chunk: _Chunk) -> Iterator[tuple[int, int, bytes]]:
        """Time, channel and data of a chunk's messages, in the order of the file; notes what else it declares."""
        content, at = self._content(chunk), 0
        while at < len(content):
            opcode, length = _RECORD.unpack_from(content, at)
            begin, at = at + _RECORD.size, at + _RECORD.size + length
            if at > len(content) or opcode not in (_SCHEMA, _CHANNEL, _MESSAGE):
                raise ValueError(f"the chunk at byte {chunk.offset} is damaged")
            if opcode == _MESSAGE:
                channel, _, time_ns, _ = _MESSAGE_HEAD.unpack_from(content, begin)
                yield time_ns, channel, content[begin + _MESSAGE_HEAD.size : at]
            else:
                self._declare(opcode, content[begin:at])

    def _content(self, chunk: _Chunk) -> bytes:
        self._stream.seek(chunk.offset)
        packed = self._stream.read(chunk.size)
        if chunk.compression == "zstd":
            content = zstd.decompress(packed)
        elif chunk.compression == "lz4":
            content = lz4.frame.decompress(packed)
        elif chunk.compression == "":
            content = packed
        else:
            raise ValueError(f"its compression {chunk.compression!r} is not known")
        if len(content) != chunk.plain_size or (chunk.crc and zlib.crc32(content) != chunk.crc):
            raise ValueError(f"the chunk at byte {chunk.offset} is damaged")
        return content
