"""Recorded decisions: the `action_chunk` topic of a bag as arrays."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_policy.core.bag import open_bag
from vla_policy.core.errors import ContractError

ACTION_CHUNK = "vla_policy_interfaces/msg/ActionChunk"


@dataclass(frozen=True)
class ServedAction:
    """One published chunk. `actions`: float64 [horizon, K]; `tokens`: int64 [horizon * K]; times in ns.

    `received_ns` is when the recorder got it, by the recorder's clock.
    """

    stamp_ns: int
    published_ns: int
    received_ns: int
    sequence: int
    actions: np.ndarray
    tokens: np.ndarray
    instruction: str
    engine_id: str
    latency_ms: float


def read_served(path: Path | str) -> Iterator[ServedAction]:
    """Every chunk of the bag in recorded order. Raises ContractError when it holds none."""
    with open_bag(path) as reader:
        connections = [item for item in reader.connections if item.msgtype == ACTION_CHUNK]
        if not connections:
            held = ", ".join(sorted(item.topic for item in reader.connections)) or "nothing"
            raise ContractError(f"{path}: no topic of type {ACTION_CHUNK}; the bag holds {held}")
        for connection, received_ns, data in reader.messages(connections=connections):
            message: Any = reader.deserialize(data, connection.msgtype)
            yield ServedAction(
                stamp_ns=_nanoseconds(message.observation_stamp),
                published_ns=_nanoseconds(message.header.stamp),
                received_ns=received_ns,
                sequence=message.sequence,
                actions=np.asarray(message.actions, np.float64).reshape(message.horizon, message.action_dim),
                tokens=np.asarray(message.tokens, np.int64),
                instruction=message.instruction,
                engine_id=message.engine_id,
                latency_ms=message.latency_ms,
            )


def _nanoseconds(stamp: Any) -> int:
    return int(stamp.sec) * 10**9 + int(stamp.nanosec)
