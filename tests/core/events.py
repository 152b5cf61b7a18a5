"""Messages as the one event that they give."""

from typing import Any

from vla_policy.core.contract import Contract
from vla_policy.core.events import Event, to_events


def single(contract: Contract, topic: str, message: Any, received_ns: int) -> Event:
    (event,) = to_events(contract, topic, message, received_ns)
    return event
