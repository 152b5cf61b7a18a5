"""Writes small bags for the tests with the bag library's own writer."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rosbags.rosbag2 import StoragePlugin, Writer

from tests.core.ros_messages import STORE

Message = tuple[str, str, int, Any]  # topic, type, time in ns, message


def write_bag(path: Path, messages: Iterable[Message], storage: StoragePlugin = StoragePlugin.MCAP) -> Path:
    """Writes `messages` in the given order."""
    connections: dict[str, Any] = {}
    with Writer(path, version=9, storage_plugin=storage) as writer:
        for topic, kind, time_ns, message in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=STORE)
            writer.write(connections[topic], time_ns, STORE.serialize_cdr(message, kind))
    return path
