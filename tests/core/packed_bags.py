"""Bags that are packed in every way, and what is read from one."""

from collections import Counter
from pathlib import Path

from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from tests.core import ros_messages as msgs
from tests.core.bags import Message
from tests.core.mcap_writer import message
from tests.core.test_bag import CONTRACT, recording
from vla_policy.core.bag import read_frames
from vla_policy.core.contract import COMPRESSED_IMAGE, JOINT_STATE, STRING
from vla_policy.core.synchroniser import Dropped, DropReason, Frame

DATA = Path(__file__).parents[1] / "data/bags"
CAMERA = "/camera/image_raw/compressed"
KINDS = {"/instruction": STRING, "/joint_states": JOINT_STATE, CAMERA: COMPRESSED_IMAGE}


def read(path: Path) -> tuple[int, Counter[tuple[str, DropReason]]]:
    """How many frames a bag gives, and what is dropped."""
    results = list(read_frames(path, CONTRACT))
    dropped = Counter((item.topic, item.reason) for item in results if isinstance(item, Dropped))
    return sum(isinstance(item, Frame) for item in results), dropped


def packed_bag(path: Path, mode: str, storage: StoragePlugin = StoragePlugin.MCAP) -> Path:
    writer = Writer(path, version=9, storage_plugin=storage)
    writer.set_compression(CompressionMode[mode], CompressionFormat.ZSTD)
    with writer:
        topics = {topic: writer.add_connection(topic, kind, typestore=msgs.STORE) for topic, kind in KINDS.items()}
        for topic, kind, time_ns, content in recording():
            writer.write(topics[topic], time_ns, msgs.STORE.serialize_cdr(content, kind))
    return path


def records_of(messages: list[Message], numbers: dict[str, int]) -> bytes:
    return b"".join(
        message(numbers[topic], time_ns, bytes(msgs.STORE.serialize_cdr(content, kind)))
        for topic, kind, time_ns, content in messages
    )
