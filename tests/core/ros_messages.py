"""Messages for the tests, made by the bag library's type store: independent of rclpy."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from rosbags.typesys import Stores, get_typestore

STORE = get_typestore(Stores.ROS2_JAZZY)
JOINTS = ("end_effector_x", "end_effector_y", "end_effector_z", "gripper")


def make(kind: str, *values: Any) -> Any:
    return STORE.types[kind](*values)


def header(stamp_ns: int, frame: str = "camera") -> Any:
    stamp = make("builtin_interfaces/msg/Time", stamp_ns // 10**9, stamp_ns % 10**9)
    return make("std_msgs/msg/Header", stamp, frame)


def text(value: str) -> Any:
    return make("std_msgs/msg/String", value)


def joints(
    stamp_ns: int, position: Sequence[float], velocity: Sequence[float] | None = None, names: Sequence[str] = JOINTS
) -> Any:
    velocities = np.asarray(velocity if velocity is not None else [0.0] * len(position), np.float64)
    empty = np.zeros(0)
    return make("sensor_msgs/msg/JointState", header(stamp_ns), list(names), np.asarray(position), velocities, empty)


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def compressed(stamp_ns: int, image: np.ndarray) -> Any:
    return encoded(stamp_ns, png(image))


def encoded(stamp_ns: int, data: bytes, form: str = "png") -> Any:
    return make("sensor_msgs/msg/CompressedImage", header(stamp_ns), form, np.frombuffer(data, np.uint8))


def raw(stamp_ns: int, image: np.ndarray, encoding: str = "rgb8") -> Any:
    rows = np.ascontiguousarray(image).reshape(image.shape[0], -1)
    data = rows.reshape(-1)
    return make(
        "sensor_msgs/msg/Image", header(stamp_ns), image.shape[0], image.shape[1], encoding, 0, rows.shape[1], data
    )


def picture(value: int, size: int = 8) -> np.ndarray:
    """uint8 [size, size, 3], different for every value."""
    return np.random.default_rng(value).integers(0, 256, (size, size, 3), np.uint8)
