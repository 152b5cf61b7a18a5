"""Writes MCAP files record by record (https://mcap.dev/spec), also such as no recorder would."""

import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import lz4.frame
from rosbags.rosbag2.reader import zstd

MAGIC = b"\x89MCAP0\r\n"
CODECS = {"": bytes, "lz4": lz4.frame.compress, "zstd": zstd.compress}


@dataclass
class McapText:
    """Records in the order of the calls. chunks: those of each chunk; a message outside stands alone."""

    profile: str = "ros2"
    channels: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    body: bytes = b""

    def channel(self, topic: str, kind: str, encoding: str = "cdr", language: str = "", qos: str = "") -> int:
        """Declares a channel whose type has the text "?"; returns its number."""
        self.channels.append((topic, kind, encoding, language, qos))
        return len(self.channels)

    def declarations(self) -> bytes:
        """Schema and channel of each."""
        made = b""
        for number, (topic, kind, encoding, language, qos) in enumerate(self.channels, 1):
            definition = "?" if language else ""
            made += _record(3, struct.pack("<H", number) + _text(kind) + _text(language) + _text(definition))
            facts = _text("offered_qos_profiles") + _text(qos)
            content = struct.pack("<HH", number, number) + _text(topic) + _text(encoding)
            made += _record(4, content + struct.pack("<I", len(facts)) + facts)
        return made

    def chunk(self, records: bytes, start_ns: int, end_ns: int, codec: str = "", crc: bool = True) -> None:
        packed = CODECS[codec](records)
        head = struct.pack("<QQQI", start_ns, end_ns, len(records), zlib.crc32(records) if crc else 0)
        self.body += _record(6, head + _text(codec) + struct.pack("<Q", len(packed)) + packed)

    def write(self, path: Path, summary: bool = True) -> Path:
        """With a summary the declarations stand at the end once more."""
        head = MAGIC + _record(1, _text(self.profile) + _text("tests"))
        data = head + self.body + _record(0x0F, struct.pack("<I", 0))
        start = len(data) if summary else 0
        end = (self.declarations() if summary else b"") + _record(2, struct.pack("<QQI", start, 0, 0)) + MAGIC
        path.write_bytes(data + end)
        return path


def message(channel: int, time_ns: int, data: bytes) -> bytes:
    return _record(5, struct.pack("<HIQQ", channel, 0, time_ns, time_ns) + data)


def _record(opcode: int, content: bytes) -> bytes:
    return struct.pack("<BQ", opcode, len(content)) + content


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data
