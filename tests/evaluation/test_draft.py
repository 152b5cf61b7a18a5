"""Contracts drafted from bags of several shapes: complete once the marked blanks are filled, and by them alone."""

import re
from pathlib import Path

import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin

from evaluation.__main__ import main
from tests.core import ros_messages as msgs
from tests.core.bags import Message, write_bag
from tests.core.ros_messages import STORE
from tests.core.test_bag import START_NS, recording
from vla_policy.core.bag import read_frames
from vla_policy.core.contract import IMAGE, JOINT_STATE, POSE_STAMPED, STRING, Contract, load_contract
from vla_policy.core.errors import ContractError
from vla_policy.core.recording import BagWriter, recorded_qos
from vla_policy.core.synchroniser import Frame
from vla_policy.core.yaml_fields import BLANK

TWIST, TRAJECTORY = "geometry_msgs/msg/TwistStamped", "trajectory_msgs/msg/JointTrajectory"
FLOATS = "std_msgs/msg/Float64MultiArray"
FILLED = {"unit": "m", "scale": "1.0", "limit": "1.0", "lower": "-2.0", "upper": "2.0", "slew": "1.0"}
FILLED |= {"controller_timeout_s": "0.5", "control_rate_hz": "20", "topic": "somewhere", "command": "twist"}


def drafted(bag: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["contract", str(bag)]) == 0
    return capsys.readouterr().out


def filled(path: Path, text: str, **values: str) -> Contract:
    """The text with every blank filled as a person might, by its key, and nothing else changed."""
    known = FILLED | values
    path.write_text(re.sub(rf"(\w+): {BLANK}", lambda match: f"{match[1]}: {known[match[1]]}", text))
    return load_contract(path)


def every(step_ms: int, count: int) -> list[int]:
    return [START_NS + (index + 1) * step_ms * 10**6 for index in range(count)]


def twists(topic: str = "/cmd") -> list[Message]:
    zero = msgs.make("geometry_msgs/msg/Vector3", 0.0, 0.0, 0.0)
    rows = []
    for time_ns in every(40, 10):
        linear = msgs.make("geometry_msgs/msg/Vector3", 0.5, 0.0, -0.25)
        twist = msgs.make("geometry_msgs/msg/Twist", linear, zero)
        rows.append((topic, TWIST, time_ns, msgs.make(TWIST, msgs.header(time_ns, "tool"), twist)))
    return rows


def images(topic: str, encoding: str = "rgb8") -> list[Message]:
    picture = msgs.picture(1) if encoding == "rgb8" else np.zeros((8, 8, 2), np.uint8)
    return [(topic, IMAGE, time_ns, msgs.raw(time_ns, picture, encoding)) for time_ns in every(50, 5)]


@pytest.mark.parametrize("storage", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_a_draft_is_a_contract_once_its_blanks_are_filled(
    tmp_path: Path, storage: StoragePlugin, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = write_bag(tmp_path / "bag", sorted([*recording("/arm", 5), *twists()], key=lambda row: row[2]), storage)
    text = drafted(bag, capsys)
    (tmp_path / "draft.yaml").write_text(text)
    with pytest.raises(ContractError, match=r"blanks to fill in: states\[0\].values\[0\].unit, .*controller_timeout_s"):
        load_contract(tmp_path / "draft.yaml")
    contract = filled(tmp_path / "contract.yaml", text, topic="/arm/instruction")
    assert [(camera.name, camera.topic) for camera in contract.cameras] == [
        ("arm_camera", "/arm/camera/image_raw/compressed")
    ]
    assert contract.state_names == msgs.JOINTS
    assert (contract.instruction.topic, contract.action.topic, contract.action.frame_id) == (
        "/arm/instruction",
        "/cmd",
        "tool",
    )
    assert contract.action.control_rate_hz == pytest.approx(25)
    assert [item.target for item in contract.action.dimensions][:3] == ["linear.x", "linear.y", "linear.z"]
    assert "0.5 to 0.5 in the bag" in text and "-0.25 to -0.25 in the bag" in text
    assert '/arm/instruction: 1 messages, the first "open the drawer"' in text
    assert len([item for item in read_frames(bag, contract) if isinstance(item, Frame)]) == 5


def test_cameras_poses_and_what_no_contract_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No task, no command; a depth camera, a topic of another kind, a pose that is not stamped."""
    vector, turn = (
        msgs.make("geometry_msgs/msg/Point", 1.0, 2.0, 3.0),
        msgs.make("geometry_msgs/msg/Quaternion", 0.0, 0.0, 0.0, 1.0),
    )
    pose = msgs.make("geometry_msgs/msg/Pose", vector, turn)
    poses = [
        ("/hand/pose", POSE_STAMPED, time_ns, msgs.make(POSE_STAMPED, msgs.header(0), pose)) for time_ns in every(50, 5)
    ]
    flags = [("/estop", "std_msgs/msg/Bool", time_ns, msgs.make("std_msgs/msg/Bool", True)) for time_ns in every(50, 2)]
    rows = [*images("/left/image_raw"), *images("/right/image_raw"), *images("/depth", "16UC1"), *poses, *flags]
    bag = write_bag(tmp_path / "bag", sorted(rows, key=lambda row: row[2]))
    text = drafted(bag, capsys)
    assert "# Not of a type that a contract uses: /estop (std_msgs/msg/Bool, 2 messages" in text
    assert re.search(r"name: depth # 5 messages, 20 Hz, NOT A PICTURE, delete it: .*16UC1", text)
    assert "NOT STAMPED: the publisher must stamp its messages" in text
    assert "the bag tells no task; replay it with --instruction" in text
    contract = filled(tmp_path / "contract.yaml", text, name="dx", target="linear.x")
    assert [camera.name for camera in contract.cameras] == ["left", "right", "depth"]
    assert [value.field for value in contract.states[0].values] == [
        *(f"position.{axis}" for axis in "xyz"),
        *(f"axis_angle.{axis}" for axis in "xyz"),
    ]
    assert contract.states[0].values[0].unit == "m" and contract.instruction.topic == "somewhere"


def test_two_publishers_of_one_topic_are_told_apart_by_their_joints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = images("/camera")
    for time_ns in every(50, 5):
        rows.append(("/joint_states", JOINT_STATE, time_ns, msgs.joints(time_ns, [0.5, 0.5], names=("a-1", "b"))))
        rows.append(("/joint_states", JOINT_STATE, time_ns + 1, msgs.joints(time_ns, [0.1], names=("grip",))))
    text = drafted(write_bag(tmp_path / "bag", sorted(rows, key=lambda row: row[2])), capsys)
    contract = filled(tmp_path / "contract.yaml", text, name="dx", target="linear.x")
    assert [[value.joint for value in state.values] for state in contract.states] == [["a-1", "b"], ["grip"]]
    assert all(state.shared for state in contract.states)


def test_joints_that_only_some_messages_name_are_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = images("/camera")
    for index, time_ns in enumerate(every(50, 5)):
        names = ("a", "b", "extra")[: 2 + index % 2]
        rows.append(("/joint_states", JOINT_STATE, time_ns, msgs.joints(time_ns, [0.5] * len(names), names=names)))
    text = drafted(write_bag(tmp_path / "bag", sorted(rows, key=lambda row: row[2])), capsys)
    assert "only some messages name extra" in text
    contract = filled(tmp_path / "contract.yaml", text, name="dx", target="linear.x")
    assert contract.state_names == ("a", "b")


def test_what_the_bag_leaves_open_stays_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two commands and two texts: named, and none of them chosen. Quality of service is the recorded publisher's."""
    duration = msgs.make("builtin_interfaces/msg/Duration", 0, 0)
    empty = np.zeros(0)
    point = msgs.make("trajectory_msgs/msg/JointTrajectoryPoint", np.asarray([0.5]), empty, empty, empty, duration)
    time_ns = START_NS + 10**9
    trajectory = msgs.make(TRAJECTORY, msgs.header(time_ns), ["elbow"], [point])
    floats = msgs.make(FLOATS, msgs.make("std_msgs/msg/MultiArrayLayout", [], 0), np.asarray([0.08]))
    joints = msgs.joints(time_ns, [0.5], names=("elbow",))
    rows = [
        ("/joint_states", JOINT_STATE, time_ns, joints),
        *images("/camera"),
        *twists(),
        ("/arm", TRAJECTORY, time_ns, trajectory),
        ("/grip", FLOATS, time_ns, floats),
    ]
    rows += [(topic, STRING, time_ns, msgs.text(topic)) for topic in ("/task", "/robot_description")]
    text = drafted(write_bag(tmp_path / "bag", sorted(rows, key=lambda row: row[2])), capsys)
    assert f"command: {BLANK}" in text and f"  topic: {BLANK}" in text
    assert "/arm (trajectory_msgs/msg/JointTrajectory, 1 messages)" in text and "/cmd (geometry_msgs" in text
    assert (
        "the topic that tells the task; the bag's texts:" in text
        and '/robot_description: 1 messages, the first "/robot' in text
    )
    assert "the bag's /grip holds 0.08 to 0.08" in text
    rows = [row for row in rows if row[0] not in ("/cmd", "/robot_description")]
    with BagWriter(tmp_path / "kept") as writer:
        for topic, kind, stamp_ns, message in sorted(rows, key=lambda row: row[2]):
            writer.add_topic(topic, kind, recorded_qos(topic != "/task", topic == "/task", 1))
            writer.write(topic, stamp_ns, bytes(STORE.serialize_cdr(message, kind)))
    text = drafted(tmp_path / "kept", capsys)
    assert '"/task", and needs qos: {reliability: best_effort, durability: transient_local}' in text
    contract = filled(tmp_path / "contract.yaml", text, unit="rad")
    assert [item.target for item in contract.action.dimensions] == ["elbow"] and contract.state_names == ("elbow",)


def test_a_bag_without_a_camera_and_a_file_in_the_way_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = write_bag(tmp_path / "bag", twists())
    assert main(["contract", str(bag)]) == 2
    assert "no camera topic" in (error := capsys.readouterr().err) and "the bag holds /cmd (geometry_msgs" in error
    assert main(["contract", str(tmp_path / "none")]) == 2
    assert "no such bag" in capsys.readouterr().err
    bag, out = write_bag(tmp_path / "seen", [*images("/camera"), *twists()]), tmp_path / "contract.yaml"
    assert main(["contract", str(bag), "--out", str(out)]) == 0
    assert f"{out}: 20 blanks to fill in" in capsys.readouterr().out
    out.write_text("mine")
    assert main(["contract", str(bag), "--out", str(out)]) == 2
    assert out.read_text() == "mine"
