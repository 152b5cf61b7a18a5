"""ROS messages as plain events: the one place that knows the fields of the contract's message types.

Works on rclpy's messages and on those that the bag library deserialises alike, because both have the same attributes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_policy.core.contract import IMAGE, JOINT_STATE, CameraTopic, Contract, InstructionTopic, StateTopic
from vla_policy.core.errors import DataError
from vla_policy.core.instruction import normalised
from vla_policy.core.ros_image import CompressedImage, EncodedImage, RawImage

# How far a quaternion that was rounded or drifted may be from a rotation, and below which sine it turns nothing.
_UNIT_TOLERANCE, _NO_TURN = 1e-2, 1e-9


@dataclass(frozen=True)
class Event:
    """What one message gives one of the contract's sources.

    `source`: the source's key. `stamp_ns`: the header's time (the instruction, which has none, carries its arrival).
    `received_ns`: when it arrived, or was recorded. `payload`: an image, float64 state values, or the instruction.
    `positions`: every joint's position in a joint state that carries them, the policy's or not; only under position
    control, which starts from them.
    """

    source: str
    stamp_ns: int
    received_ns: int
    payload: EncodedImage | np.ndarray | str
    positions: Mapping[str, float] | None = None


def nanoseconds(time: Any) -> int:
    """Of a message's time or duration."""
    return int(time.sec) * 10**9 + int(time.nanosec)


def to_events(contract: Contract, topic: str, message: Any, received_ns: int) -> list[Event]:
    """What `message` on the contract's `topic` gives: one event, or of a joint state one for each entry that it serves.

    Raises DataError for a message that must not be used: no stamp, a joint missing, a value that is not finite,
    an instruction that is too long or not printable. An empty instruction is valid: it means "no task".
    """
    source, *others = (source for source in contract.sources if source.topic == topic)
    if isinstance(source, InstructionTopic):
        return [to_instruction(contract, message.data, received_ns)]
    stamp_ns = nanoseconds(message.header.stamp)
    if stamp_ns <= 0:
        raise DataError(f"{topic}: header.stamp is {stamp_ns} ns; the publisher must stamp its messages")
    if isinstance(source, CameraTopic):
        return [Event(topic, stamp_ns, received_ns, _image(source, message))]
    entries = [item for item in (source, *others) if isinstance(item, StateTopic)]
    if len(entries) > 1:
        # Several publishers on one topic: a message serves the entries of whose joints it names any.
        served = [item for item in entries if not item.joints.isdisjoint(message.name)]
        entries = served or entries[:1]
    positions = None
    if contract.action.command == "joint_trajectory" and source.type == JOINT_STATE:
        positions = dict(zip(message.name, (float(value) for value in message.position), strict=False))
    return [Event(item.key, stamp_ns, received_ns, _state(item, message), positions) for item in entries]


def to_instruction(contract: Contract, text: str, received_ns: int) -> Event:
    """What the contract's instruction topic gives when it says `text`. Raises as `to_events` does."""
    source, text = contract.instruction, normalised(text)
    if len(text) > source.max_length:
        raise DataError(
            f"{source.topic}: instruction of {len(text)} characters; at most {source.max_length} are allowed"
        )
    if not text.isprintable():
        raise DataError(f"{source.topic}: instruction holds characters that are not printable: {text[:80]!r}")
    return Event(source.topic, received_ns, received_ns, text)


def _image(source: CameraTopic, message: Any) -> EncodedImage:
    data = memoryview(message.data)
    if source.type != IMAGE:
        return CompressedImage(message.format, data)
    size = (message.width, message.height)
    if (source.width, source.height) != (None, None) and size != (source.width, source.height):
        raise DataError(f"{source.topic}: expected {source.width}x{source.height}, got {size[0]}x{size[1]}")
    return RawImage(message.height, message.width, message.encoding, message.step, data)


def _state(source: StateTopic, message: Any) -> np.ndarray:
    if source.type == JOINT_STATE:
        values = [_joint(source, message, value.joint, value.field) for value in source.values]
    else:
        values = [_pose(source, message, value.field) for value in source.values]
    wrong = [value.name for value, number in zip(source.values, values, strict=True) if not np.isfinite(number)]
    if wrong:
        raise DataError(f"{source.topic}: state {', '.join(wrong)} is not finite")
    return np.asarray(values, np.float64)


def _joint(source: StateTopic, message: Any, joint: str | None, field: str) -> float:
    if joint not in message.name:
        raise DataError(
            f"{source.topic}: joint {joint!r} is missing; the message names {', '.join(message.name) or 'none'} "
            "(where several nodes publish on one topic, give each one's joints an entry of their own in states)"
        )
    values, index = getattr(message, field), list(message.name).index(joint)
    if index >= len(values):
        raise DataError(f"{source.topic}: joint {joint!r} has no {field} ({len(values)} values)")
    return float(values[index])


def _pose(source: StateTopic, message: Any, field: str) -> float:
    part, axis = field.split(".")
    if part == "axis_angle":
        return float(_axis_angle(source, message.pose.orientation)["xyz".index(axis)])
    return float(getattr(getattr(message.pose, part), axis))


def _axis_angle(source: StateTopic, orientation: Any) -> np.ndarray:
    """float64 [3]: the unit axis times the angle in [0, 2 pi] that the quaternion says.

    Not folded at pi: of q and -q, which turn alike, LIBERO's policies were trained on the one that the robot gave, and
    a hand that points down turns by about pi. Raises DataError for what is no rotation.
    """
    quaternion = np.asarray([orientation.x, orientation.y, orientation.z, orientation.w], np.float64)
    norm = float(np.linalg.norm(quaternion))
    if not abs(norm - 1) < _UNIT_TOLERANCE:
        raise DataError(f"{source.topic}: orientation {quaternion.tolist()} has length {norm:.4g}, expected 1")
    sine = float(np.linalg.norm(quaternion[:3]))
    if sine < _NO_TURN:
        return np.zeros(3)
    return quaternion[:3] / sine * (2 * math.atan2(sine, quaternion[3]))
