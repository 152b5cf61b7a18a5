"""Recorded bags as frames: mcap or sqlite3, ours or anyone's that holds the contract's topics."""

import sqlite3
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.interfaces import Connection
from rosbags.rosbag2 import ReaderError
from rosbags.typesys import Stores, get_typestore

from vla_policy.core.contract import Contract
from vla_policy.core.errors import ContractError, DataError
from vla_policy.core.events import Event, to_event
from vla_policy.core.synchroniser import Dropped, DropReason, Frame, Synchroniser

# What the bag library raises on a file that is not whole: its own errors, and those of what lies beneath.
_DAMAGE = (AnyReaderError, ReaderError, sqlite3.Error, struct.error, AssertionError)


@dataclass(frozen=True)
class BagSummary:
    """Messages per contract topic and the recording's span."""

    path: str
    messages: dict[str, int]
    duration_s: float


def resolve(topic: str, namespace: str = "") -> str:
    """The absolute name of a contract's topic under a namespace, as ROS resolves it."""
    return topic if topic.startswith("/") else f"/{namespace.strip('/')}/{topic}".replace("//", "/")


@contextmanager
def open_bag(path: Path | str) -> Iterator[AnyReader]:
    """An open reader of the bag folder (or single .mcap or .db3 file) at `path`.

    Raises ContractError when it is missing, damaged or truncated, also while messages are being read.
    """
    path = Path(path)
    if not path.exists():
        raise ContractError(f"{path}: no such bag; expected a rosbag2 folder or an .mcap file")
    try:
        with AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY)) as reader:
            yield reader
    except (*_DAMAGE, OSError) as error:
        raise ContractError(f"{path}: not a readable ROS 2 bag ({error}); record or copy it again") from error


def contract_connections(reader: AnyReader, contract: Contract, path: Path | str, namespace: str) -> dict[str, str]:
    """Contract topic by the bag's topic name. Raises ContractError where the bag lacks one."""
    recorded = {connection.topic: connection.msgtype for connection in reader.connections}
    names: dict[str, str] = {}
    for topic, kind in contract.input_types.items():
        name = resolve(topic, namespace)
        if name not in recorded:
            held = ", ".join(sorted(recorded)) or "nothing"
            raise ContractError(f"{path}: no topic {name}, which {contract.path} asks for; the bag holds {held}")
        if recorded[name] != kind:
            raise ContractError(f"{path}: topic {name} is {recorded[name]}, {contract.path} expects {kind}")
        names[name] = topic
    return names


def summarise(path: Path | str, contract: Contract, namespace: str = "") -> BagSummary:
    """Checks that the bag fits the contract and counts its messages."""
    with open_bag(path) as reader:
        names = contract_connections(reader, contract, path, namespace)
        counts: Counter[str] = Counter()
        for connection in reader.connections:
            if connection.topic in names:
                counts[names[connection.topic]] += connection.msgcount
        return BagSummary(str(path), dict(counts), reader.duration / 1e9)


def read_events(path: Path | str, contract: Contract, namespace: str = "") -> Iterator[Event | Dropped]:
    """The bag's messages in recorded order; a message that must not be used comes as a `Dropped`."""
    with open_bag(path) as reader:
        names = contract_connections(reader, contract, path, namespace)
        connections: list[Connection] = [item for item in reader.connections if item.topic in names]
        for connection, received_ns, data in reader.messages(connections=connections):
            topic = names[connection.topic]
            try:
                yield to_event(contract, topic, reader.deserialize(data, connection.msgtype), received_ns)
            except DataError as error:
                yield Dropped(topic, received_ns, DropReason.INVALID_MESSAGE, str(error))


def read_frames(path: Path | str, contract: Contract, namespace: str = "") -> Iterator[Frame | Dropped]:
    """Every frame of the bag exactly once, and every message or frame that could not be used with its reason."""
    synchroniser = Synchroniser(contract)
    for event in read_events(path, contract, namespace):
        yield from synchroniser.offer(event)
    yield from synchroniser.flush()
