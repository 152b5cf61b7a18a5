"""A contract and a bag for the tiny policy of `tests.tiny`."""

from pathlib import Path

import numpy as np

from tests.core.bags import write_bag
from tests.core.hostile_images import HOSTILE, PNG, Hostile
from tests.core.ros_messages import compressed, encoded, joints, text
from tests.tiny import INSTRUCTIONS

_PERIOD_NS = 200_000_000

_CONTRACT = """\
kind: contract
schema_version: 1
cameras:
  - {name: front, topic: camera/image_raw/compressed, type: sensor_msgs/msg/CompressedImage}
states:
  - topic: joint_states
    type: sensor_msgs/msg/JointState
    values:
      - {name: "x", joint: slide, field: position, unit: m}
      - {name: gripper_width, joint: gripper, field: position, unit: m}
instruction: {topic: instruction}
action:
  command: twist
  topic: cmd_twist
  frame_id: world
  control_rate_hz: 20
  controller_timeout_s: 0.5
  dimensions:
    - {name: dx, target: linear.x, unit: m/s}
    - {name: dy, target: linear.y, unit: m/s}
    - {name: gripper, target: gripper, unit: "1"}
  gripper: {topic: gripper_command, threshold: 0.0, above_m: 0.0, below_m: 0.08}
"""


def tiny_contract(path: Path) -> Path:
    """Writes a contract with the tiny policy's two states and three actions."""
    path.write_text(_CONTRACT, encoding="utf-8")
    return path


def tiny_bag(path: Path, episodes: int = 2, frames: int = 10, seed: int = 0) -> Path:
    """Writes an mcap bag: per episode an instruction, then joint and camera messages at 5 Hz."""
    generator = np.random.default_rng(seed)
    messages = []
    now_ns = 1_000_000_000_000
    for episode in range(episodes):
        now_ns += _PERIOD_NS
        instruction = INSTRUCTIONS[episode % len(INSTRUCTIONS)]
        messages.append(("/instruction", "std_msgs/msg/String", now_ns, text(instruction)))
        scene = generator.integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        for frame in range(frames):
            now_ns += _PERIOD_NS
            position = [0.05 * frame, 0.01 * (frame % 8)]
            state = joints(now_ns, position, names=("slide", "gripper"))
            image = compressed(now_ns, np.roll(scene, 2 * frame, axis=1))
            messages.append(("/joint_states", "sensor_msgs/msg/JointState", now_ns, state))
            messages.append(("/camera/image_raw/compressed", "sensor_msgs/msg/CompressedImage", now_ns + 1, image))
    return write_bag(path, messages)


def hostile_bag(path: Path) -> Path:
    """Writes an mcap bag of one episode: two pictures, every hostile image, and two more pictures."""
    messages = [("/instruction", "std_msgs/msg/String", _PERIOD_NS, text(INSTRUCTIONS[0]))]
    pictures = [Hostile(PNG, "")] * 2
    for number, image in enumerate((*pictures, *HOSTILE.values(), *pictures), start=2):
        now_ns = number * _PERIOD_NS
        state = joints(now_ns, [0.01 * number, 0.01], names=("slide", "gripper"))
        messages.append(("/joint_states", "sensor_msgs/msg/JointState", now_ns, state))
        picture = encoded(now_ns, image.data, image.format)
        messages.append(("/camera/image_raw/compressed", "sensor_msgs/msg/CompressedImage", now_ns + 1, picture))
    return write_bag(path, messages)
