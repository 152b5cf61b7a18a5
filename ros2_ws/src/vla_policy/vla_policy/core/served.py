"""Recorded decisions: the `action_chunk` topic of a bag as arrays."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_policy.core.bag import carries, open_bag
from vla_policy.core.errors import ContractError, DataError
from vla_policy.core.events import nanoseconds

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
    """Every chunk of the bag in recorded order. Raises ContractError when it holds none, or one that is damaged."""
    with open_bag(path) as bag:
        channels = [channel for channel in bag.channels if carries(channel, ACTION_CHUNK)]
        if not channels:
            held = ", ".join(sorted(channel.topic for channel in bag.channels)) or "nothing"
            raise ContractError(f"{path}: no topic of type {ACTION_CHUNK}; the bag holds {held}")
        for recorded in bag.messages(channels):
            try:
                message = bag.decode(recorded)
                actions = np.asarray(message.actions, np.float64).reshape(message.horizon, message.action_dim)
            except (DataError, ValueError) as error:
                raise ContractError(f"{path}: a decision cannot be read ({error}); record it again") from error
            yield ServedAction(
                stamp_ns=nanoseconds(message.observation_stamp),
                published_ns=nanoseconds(message.header.stamp),
                received_ns=recorded.time_ns,
                sequence=message.sequence,
                actions=actions,
                tokens=np.asarray(message.tokens, np.int64),
                instruction=message.instruction,
                engine_id=message.engine_id,
                latency_ms=message.latency_ms,
            )
