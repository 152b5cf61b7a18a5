"""What a bag tells was carried out: the commands on the contract's action topics, turned back into action values."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_policy.core.bag import Bag, open_bag, resolve
from vla_policy.core.contract import GRIPPER, ActionContract, Contract

_FIRST, _SECOND = 1.0, -1.0
"""A gripper command above the contract's threshold, and one below: of the two, the nearer."""


class Commands:
    """Every command of a bag, by its recorded time."""

    def __init__(
        self, action: ActionContract, motions: list[tuple[int, np.ndarray]], grips: list[tuple[int, float]]
    ) -> None:
        self._action, self._motions, self._grips = action, motions, grips
        self._times = [time_ns for time_ns, _ in motions], [time_ns for time_ns, _ in grips]

    @staticmethod
    def read(path: Path, contract: Contract, namespace: str) -> "Commands | None":
        """None where the bag does not hold the commands of every action value."""
        action = contract.action
        topics = [action.topic] + ([action.gripper.topic] if action.gripper else [])
        with open_bag(path) as bag:
            messages = [_messages(bag, resolve(topic, namespace)) for topic in topics]
        if not all(messages):
            return None
        motions = [(time_ns, values) for time_ns, one in messages[0] if (values := _motion(one, action)) is not None]
        grips = [(time_ns, _grip(one, action)) for time_ns, one in messages[1]] if action.gripper else []
        return Commands(action, motions, grips) if motions else None

    def between(self, start_ns: int, end_ns: int) -> np.ndarray | None:
        """float32 [K], the policy's values of the commands after `start_ns` and not after `end_ns`; None without any.

        A decision comes some time after its image and is held until the next: the median is what held longest.
        """
        motions = self._motions[slice(*(bisect_right(self._times[0], at) for at in (start_ns, end_ns)))]
        if not motions:
            return None
        values = np.median([motion for _, motion in motions], axis=0)
        if self._action.gripper:
            first, last = (bisect_right(self._times[1], at) for at in (start_ns, end_ns))
            grips = self._grips[first:last] or self._grips[max(first - 1, 0) : first]  # or what it was told before
            if not grips:
                return None
            places = [dimension.target == GRIPPER for dimension in self._action.dimensions]
            values[places] = _FIRST if np.median([grip for _, grip in grips]) > 0 else _SECOND
        return values.astype(np.float32)


def _messages(bag: Bag, topic: str) -> Sequence[tuple[int, Any]]:
    channels = [channel for channel in bag.channels if channel.topic == topic and channel.encoding == "cdr"]
    return [(item.time_ns, bag.decode(item)) for item in bag.messages(channels)] if channels else []


def _motion(message: Any, action: ActionContract) -> np.ndarray | None:
    """float64 [K], the gripper's place 0; None for a message that does not command every moving value."""
    values = np.zeros(len(action.dimensions))
    for k, dimension in enumerate(action.dimensions):
        if dimension.target == GRIPPER:
            continue
        command = _twist(message, dimension.target) if action.command == "twist" else _joint(message, dimension.target)
        if command is None or not np.isfinite(command):
            return None
        values[k] = (command - dimension.offset) / dimension.scale if dimension.scale else 0.0
    return values


def _twist(message: Any, target: str) -> float | None:
    part, _, axis = target.partition(".")
    twist = getattr(message, "twist", None)
    return None if twist is None else float(getattr(getattr(twist, part), axis))


def _joint(message: Any, target: str) -> float | None:
    names, points = getattr(message, "joint_names", ()), getattr(message, "points", ())
    if target not in names or not points or len(points[0].positions) != len(names):
        return None
    return float(points[0].positions[list(names).index(target)])


def _grip(message: Any, action: ActionContract) -> float:
    assert action.gripper is not None
    data = np.ravel(message.data)
    width = float(data[0]) if data.size else action.gripper.below_m
    nearer = abs(width - action.gripper.above_m) < abs(width - action.gripper.below_m)
    return _FIRST if nearer else _SECOND
