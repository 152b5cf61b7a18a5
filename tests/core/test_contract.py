"""The topic contract: what is read, and how each mistake is named."""

from pathlib import Path

import pytest
import yaml

from vla_policy.core.contract import Contract, WorkspaceAxis, load_contract
from vla_policy.core.errors import ContractError

JOINT = {"name": "q", "target": "elbow", "unit": "rad", "lower": -1.0, "upper": 2.0, "slew": 1.0}
POSITION = {"command": "joint_trajectory", "topic": "arm"}
BOX = {"target": "linear.x", "state": "x", "lower": -0.2, "upper": 0.3}
LIBERO = Path(__file__).parents[2] / "ros2_ws/src/vla_policy/config/libero.yaml"


def edited(tmp_path: Path, edit) -> Contract:
    content = yaml.safe_load(LIBERO.read_text())
    edit(content)
    path = tmp_path / "contract.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_contract(path)


def position_control(content) -> None:
    content["action"].update(POSITION | {"dimensions": [JOINT]})
    del content["action"]["gripper"]


def without(key: str) -> dict[str, object]:
    return {name: value for name, value in JOINT.items() if name != key}


def test_limits_of_velocities_positions_and_the_workspace(tmp_path: Path) -> None:
    twist = edited(tmp_path, lambda c: c["action"].update(workspace=[BOX])).action
    assert (twist.dimensions[0].lower, twist.dimensions[0].upper) == (-1.5, 1.5)
    assert twist.workspace == (WorkspaceAxis("linear.x", "x", -0.2, 0.3),)
    arm = edited(tmp_path, position_control)
    assert (arm.action.dimensions[0].lower, arm.action.dimensions[0].upper, arm.action.hold_commands) == (-1.0, 2.0, 4)


def test_the_shipped_contract_names_states_in_the_policy_s_order() -> None:
    contract = load_contract(LIBERO)
    assert contract.state_names == ("x", "y", "z", "gripper_width", "gripper_velocity")
    assert contract.sources[0] is contract.instruction
    assert contract.action.control_period_ns == 50_000_000
    assert len(contract.sha256) == 64


def test_defaults_are_sensor_qos(tmp_path: Path) -> None:
    contract = load_contract(LIBERO)
    assert contract.primary.qos.reliability == "best_effort"
    assert contract.instruction.qos.reliability == "reliable"


def parted(*parts: slice, **changes: object):
    """The joint states' values in entries of their own, all of one topic."""

    def edit(content: dict) -> None:
        (whole,) = content["states"]
        content["states"] = [{**whole, "values": whole["values"][part]} for part in parts]
        content["states"][-1].update(changes)

    return edit


def turn(topic: str, field: str):
    """One more entry: a part of a pose."""
    value = {"name": "turn", "field": field, "unit": "rad"}
    entry = {"topic": topic, "type": "geometry_msgs/msg/PoseStamped", "values": [value]}
    return lambda content: content["states"].append(entry)


def test_two_publishers_of_one_topic_are_two_sources(tmp_path: Path) -> None:
    contract = edited(tmp_path, parted(slice(3), slice(3, 5)))
    assert contract.state_names == load_contract(LIBERO).state_names
    assert [state.key for state in contract.states] == [
        "joint_states (x, y, z)",
        "joint_states (gripper_width, gripper_velocity)",
    ]
    assert list(contract.input_types) == ["instruction", "joint_states", "camera/image_raw/compressed"]
    assert load_contract(LIBERO).states[0].key == "joint_states"


def test_the_state_of_openvla_oft_s_libero_policies_can_be_named(tmp_path: Path) -> None:
    fields = [*(f"position.{axis}" for axis in "xyz"), *(f"axis_angle.{axis}" for axis in "xyz")]
    hand = [{"name": field, "field": field, "unit": "rad" if "angle" in field else "m"} for field in fields]
    fingers = [
        {"name": name, "joint": f"panda_{name}", "field": "position", "unit": "m"}
        for name in ("finger_joint1", "finger_joint2")
    ]
    states = [
        {"topic": "tool_pose", "type": "geometry_msgs/msg/PoseStamped", "values": hand},
        {"topic": "joint_states", "type": "sensor_msgs/msg/JointState", "values": fingers},
    ]
    contract = edited(tmp_path, lambda content: content.update(states=states))
    assert contract.state_names == (*fields, "finger_joint1", "finger_joint2")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(kind="plan"), "expected kind 'contract' version 1, got 'plan'"),
        (lambda c: c.update(cameras=[]), "cameras: expected at least one"),
        (lambda c: c["cameras"][0].pop("topic"), r"cameras\[0\]: missing key 'topic'"),
        (lambda c: c["cameras"][0].update(type="sensor_msgs/msg/PointCloud2"), "type: expected one of sensor_msgs"),
        (lambda c: c["cameras"][0].update(qos={"reliability": "sometimes"}), "expected one of best_effort, reliable"),
        (lambda c: c["cameras"][0].update(colour="rgb"), "unknown key.s. colour; known: crop_area, height"),
        (lambda c: c["cameras"][0].update(rotate180=True), "unknown key.s. rotate180; did you mean 'rotate_180'?"),
        (lambda c: c["cameras"][0].update(topc=c["cameras"][0].pop("topic")), "missing key 'topic' .str.; is 'topc'"),
        (
            lambda c: c.update(synchronization=c.pop("synchronisation")),
            "synchronization; did you mean 'synchronisation'",
        ),
        (lambda c: c["cameras"][0].update(qos={"reliabilty": "reliable"}), "did you mean 'reliability'?"),
        (lambda c: c["cameras"][0].update(width=None), "width: expected int, got None"),
        (lambda c: c["states"][0]["values"][1].update(name=True), "expected str, got True; .*: quote it"),
        (lambda c: c["cameras"][0].update(crop_area=1.5), "crop_area"),
        (lambda c: c["states"][0]["values"][0].update(field="torque"), "expected one of position, velocity, effort"),
        (lambda c: c["states"][0]["values"][1].update(name="x"), "state name 'x' is used twice"),
        (lambda c: c["instruction"].update(topic="joint_states"), "topic 'joint_states' is used twice"),
        (parted(slice(3), slice(2, 5)), "state name 'z' is used twice"),
        (parted(slice(3), slice(3, 5), qos={"depth": 7}), "'joint_states' is used 2 times with different qos"),
        (
            turn("joint_states", "axis_angle.x"),
            "used 2 times; only entries of type sensor_msgs/msg/JointState can",
        ),
        (turn("pose", "axis_angle.w"), "field: expected one of .*axis_angle.z, got 'axis_angle.w'"),
        (lambda c: c["synchronisation"].update(episode_gap_s=0), "episode_gap_s: expected a number above 0"),
        (lambda c: c["instruction"].update(topic="two words"), "expected a ROS topic name"),
        (lambda c: c["cameras"][0].update(topic="wrist-camera/image"), "expected a ROS topic name"),
        (lambda c: c["action"].update(topic="0_cmd"), "expected a ROS topic name"),
        (
            lambda c: position_control(c) or c.pop("states"),
            "add a sensor_msgs/msg/JointState",
        ),
        (lambda c: c["action"].update(POSITION | {"dimensions": [JOINT | {"slew": None}]}), "slew: expected float"),
        (lambda c: c["action"].update(POSITION | {"dimensions": [without("slew")]}), "missing key 'slew'"),
        (lambda c: c["action"].update(POSITION | {"dimensions": [without("upper")]}), "missing key 'upper'"),
        (lambda c: c["action"].update(POSITION | {"dimensions": [JOINT | {"limit": 2.0}]}), "unknown key.s. limit"),
        (lambda c: c["action"].update(POSITION | {"dimensions": [JOINT | {"lower": 3.0}]}), "lower below upper"),
        (lambda c: c["action"].pop("controller_timeout_s"), "missing key 'controller_timeout_s'"),
        (lambda c: c["action"].update(controller_timeout_s=0.02), "would stop between two commands"),
        (lambda c: c["action"].update(hold_commands=-1), "hold_commands: expected 0 or more"),
        (lambda c: c["action"].update(workspace=[BOX | {"state": "elbow"}]), "state 'elbow' is not a name of states"),
        (lambda c: c["action"].update(workspace=[BOX | {"target": "angular.x"}]), "expected a linear twist field"),
        (lambda c: c["action"].update(workspace=[BOX | {"lower": 9.0}]), "lower below upper"),
        (lambda c: c["action"]["dimensions"][0].update(scale=float("inf")), "scale: expected a finite number"),
        (lambda c: c["action"].pop("gripper"), "missing key 'gripper'"),
        (lambda c: c["action"]["gripper"].update(hysteresis=-0.1), "hysteresis: expected 0 or more, got -0.1"),
        (lambda c: c["action"]["gripper"].update(above_m=0.08), "both 0.08; the gripper never moves"),
        (lambda c: c["action"]["gripper"].update(max_effort_n=5), "unknown key.s. max_effort_n"),
        (
            lambda c: c["action"]["gripper"].update(type="control_msgs/action/GripperCommand"),
            "missing key 'max_effort_n'",
        ),
        (lambda c: c["action"].update(other_publishers="shout"), "expected one of disarm, hold, ignore, got 'shout'"),
        (lambda c: c["action"].update(frame_id="<fill in>"), "1 blanks to fill in: action.frame_id"),
        (lambda c: c["action"]["dimensions"][0].update(target="linear.w"), "expected one of linear.x"),
        (lambda c: c["action"]["dimensions"][0].update(limit=0), "limit: expected a number above 0"),
        (lambda c: c["action"]["dimensions"][0].update(scale="fast"), "scale: expected float, got 'fast'"),
        (lambda c: c["synchronisation"].update(slop_ms=-1), "slop_ms: expected a number above 0"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, edit, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        edited(tmp_path, edit)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="cannot be read"):
        load_contract(tmp_path / "none.yaml")
    (tmp_path / "twice.yaml").write_text(LIBERO.read_text().replace("control_rate_hz: 20", "topic: other"))
    with pytest.raises(ContractError, match="key 'topic' stands twice in one mapping"):
        load_contract(tmp_path / "twice.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1, 2")
    with pytest.raises(ContractError, match="not valid YAML"):
        load_contract(tmp_path / "broken.yaml")
