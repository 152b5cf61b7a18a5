"""Bags to frames: both storages, any namespace, and the same frames as the live path gives."""

from pathlib import Path

import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin

from tests.core import ros_messages as msgs
from tests.core.bags import Message, write_bag
from tests.core.events import single
from vla_policy.core.bag import count_messages, read_frames
from vla_policy.core.contract import COMPRESSED_IMAGE, JOINT_STATE, STRING, load_contract
from vla_policy.core.errors import ContractError
from vla_policy.core.observe import observe
from vla_policy.core.synchroniser import Dropped, DropReason, Frame, Synchroniser

CONTRACT = load_contract(Path(__file__).parents[2] / "ros2_ws/src/vla_policy/config/libero.yaml")
START_NS = 1_700_000_000 * 10**9


def recording(prefix: str = "", frames: int = 5, wrist: str = "") -> list[Message]:
    """Frames at 20 Hz; the camera arrives 1 ms after its stamp, one on the topic `wrist` 3 ms after it."""
    messages: list[Message] = [(f"{prefix}/instruction", STRING, START_NS, msgs.text("open the drawer"))]
    for index in range(frames):
        stamp = START_NS + (index + 1) * 50_000_000
        joints = msgs.joints(stamp, [index, 0, 0, 0.04])
        messages.append((f"{prefix}/joint_states", JOINT_STATE, stamp, joints))
        image = msgs.compressed(stamp, msgs.picture(index))
        messages.append((f"{prefix}/camera/image_raw/compressed", COMPRESSED_IMAGE, stamp + 1_000_000, image))
        if wrist:
            image = msgs.compressed(stamp + 2_000_000, msgs.picture(1000 + index))
            messages.append((f"{prefix}/{wrist}", COMPRESSED_IMAGE, stamp + 3_000_000, image))
    return messages


@pytest.mark.parametrize("storage", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_every_frame_once_with_its_own_image_and_state(tmp_path: Path, storage: StoragePlugin) -> None:
    bag = write_bag(tmp_path / "bag", recording(), storage)
    frames = list(read_frames(bag, CONTRACT))
    assert len(frames) == 5
    for index, frame in enumerate(frames):
        assert isinstance(frame, Frame) and frame.state is not None
        observation = observe(frame, CONTRACT)
        np.testing.assert_array_equal(observation.image, msgs.picture(index))
        assert (frame.state[0], frame.step, observation.instruction) == (index, index, "open the drawer")


def test_bag_and_live_paths_give_the_same_frames(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", recording())
    synchroniser = Synchroniser(CONTRACT)
    live = []
    for topic, _, time_ns, message in recording():
        live += synchroniser.push(single(CONTRACT, topic.lstrip("/"), message, time_ns))
    for recorded, received in zip(read_frames(bag, CONTRACT), live, strict=True):
        assert isinstance(recorded, Frame) and isinstance(received, Frame)
        assert recorded.stamp_ns == received.stamp_ns and recorded.instruction == received.instruction
        np.testing.assert_array_equal(recorded.state, received.state)
        np.testing.assert_array_equal(recorded.images[0].decode(), received.images[0].decode())


def test_a_namespace_is_resolved(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", recording("/left_arm"))
    assert len(list(read_frames(bag, CONTRACT, namespace="left_arm"))) == 5
    assert count_messages(bag, CONTRACT, "/left_arm")["joint_states"] == 5
    with pytest.raises(
        ContractError,
        match=r"no topics /instruction, /joint_states, /camera/\S+, which .*; the bag holds /left_arm/camera",
    ):
        list(read_frames(bag, CONTRACT))


def test_a_bad_message_is_reported_and_the_rest_served(tmp_path: Path) -> None:
    messages = recording()
    broken = msgs.joints(START_NS + 60_000_000, [float("nan"), 0, 0, 0])
    messages.insert(3, ("/joint_states", JOINT_STATE, START_NS + 60_000_000, broken))
    results = list(read_frames(write_bag(tmp_path / "bag", messages), CONTRACT))
    assert [result.reason for result in results if isinstance(result, Dropped)] == [DropReason.INVALID_MESSAGE]
    assert sum(isinstance(result, Frame) for result in results) == 5


def test_wrong_bags_are_named(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="no such bag"):
        list(read_frames(tmp_path / "nothing", CONTRACT))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ContractError, match="not a readable ROS 2 bag"):
        list(read_frames(tmp_path / "empty", CONTRACT))
    typed = [("/instruction", "std_msgs/msg/Header", START_NS, msgs.header(START_NS))]
    with pytest.raises(ContractError, match="topic /instruction is std_msgs/msg/Header"):
        list(read_frames(write_bag(tmp_path / "typed", typed), CONTRACT))
    cut = write_bag(tmp_path / "cut", recording())
    (storage,) = cut.glob("*.mcap")
    storage.write_bytes(storage.read_bytes()[:2000])
    with pytest.raises(ContractError, match="not a readable ROS 2 bag"):
        list(read_frames(cut, CONTRACT))
