"""The policy node among others: what it sends row by row, who else commands or publishes, and the e-stop."""

import threading
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tests.core.ros_messages import JOINTS
from tests.ros.runs import Runs
from tests.ros.world import CONTRACT, World, fake_engine, node_command, process

from geometry_msgs.msg import TwistStamped  # isort: skip  # after the importorskip in tests.ros.world
from lifecycle_msgs.msg import Transition  # isort: skip
from rclpy.time import Time  # isort: skip
from sensor_msgs.msg import JointState  # isort: skip
from std_msgs.msg import Float64MultiArray  # isort: skip
from std_srvs.srv import SetBool  # isort: skip
from trajectory_msgs.msg import JointTrajectory  # isort: skip
from vla_policy_interfaces.action import RunPolicy  # isort: skip


@pytest.mark.parametrize("policy", ["disarm", "hold", "ignore"])
def test_another_publisher_of_the_commands_is_seen(world: World, tmp_path: Path, policy: str) -> None:
    """It appears while the policy moves the robot, and leaves; then it is there from the start."""
    content = yaml.safe_load(CONTRACT.read_text())
    content["action"]["other_publishers"] = policy
    contract, log = tmp_path / "contract.yaml", tmp_path / "log"
    contract.write_text(yaml.safe_dump(content))
    with process(node_command(fake_engine(tmp_path / "engine"), contract, disarm_after=0.0), world.domain, log):
        world.start_policy()
        teleoperation = world.node.create_publisher(TwistStamped, "cmd_twist", 1)
        world.wait(lambda: world.diagnostics.get("other publishers /cmd_twist") == "/world", "its name")
        assert "others command the robot: /world on /cmd_twist" in log.read_text()
        if policy == "ignore":
            world.wait_moving()
            return
        world.wait_holding("other_publisher")
        assert "held by a fault: other_publisher" in world.diagnostics["summary"]
        assert not world.trigger("start").success
        assert Runs(world).code() == RunPolicy.Result.OTHER_PUBLISHER
        world.node.destroy_publisher(teleoperation)
        if policy == "disarm":
            world.wait(lambda: world.diagnostics["holding"] == "not_started", "a robot that waits for its operator")
            assert not world.moving and world.trigger("start").success
        world.wait_moving()
        grip = world.node.create_publisher(Float64MultiArray, "gripper_command", 1)
        world.wait_holding("other_publisher")
        for transition in (Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_ACTIVATE):
            assert world.change_state(transition)
        world.wait_active()
        answer = world.call(SetBool, "/policy/enable", SetBool.Request(data=True))
        assert (
            "enabled, but another node commands the robot: /gripper_command from /world; end it first" in answer.message
        )
        world.node.destroy_publisher(grip)


def test_two_live_publishers_of_one_topic(world: World, tmp_path: Path) -> None:
    """An arm and a gripper that publish their joints on one topic: configured, served as one state, and each must be
    fresh and there."""
    content = yaml.safe_load(CONTRACT.read_text())
    (whole,) = content["states"]
    content["states"] = [whole | {"values": whole["values"][part]} for part in (slice(3), slice(3, 5))]
    contract, log = tmp_path / "contract.yaml", tmp_path / "log"
    contract.write_text(yaml.safe_dump(content))
    fingers = world.node.create_publisher(JointState, "joint_states", 50)
    there = threading.Event()

    def publish() -> None:
        if there.is_set():
            joints = JointState(name=["gripper"], position=[0.04], velocity=[0.5])
            joints.header.stamp = world.node.get_clock().now().to_msg()
            fingers.publish(joints)

    world.node.create_timer(0.03, publish)
    world.sensors.joints = JOINTS[:3]
    engine = fake_engine(tmp_path / "engine", action="echo")
    command = node_command(engine, contract, autostart=False, source_wait=3.0, source_timeout=0.5)
    with process(command, world.domain, log):
        assert not world.change_state(Transition.TRANSITION_CONFIGURE), "the fingers' driver is silent"
        assert "/joint_states (gripper_width, gripper_velocity): no message within 3 s" in log.read_text()
        there.set()
        assert world.change_state(Transition.TRANSITION_CONFIGURE), log.read_text()
        assert world.change_state(Transition.TRANSITION_ACTIVATE)
        world.start_policy()
        state = list(world.chunks[-1].actions[:5])
        assert state == pytest.approx([0.1, 0.2, 0.3, 0.04, 0.5]), "both drivers' values in one state"
        assert "drops invalid_message" not in world.diagnostics
        there.clear()
        world.wait_holding("stale_state")
        assert world.diagnostics["fault joint_states (gripper_width, gripper_velocity)"] == "stale_state"
        assert "fault joint_states (x, y, z)" not in world.diagnostics
        there.set()
        world.wait_moving()
        world.sensors.state = False
        world.wait_holding("stale_state")
        world.wait(lambda: "fault joint_states (x, y, z)" in world.diagnostics, "the arm's name")


def test_the_e_stop_latches_whatever_the_engine_does(world: World, tmp_path: Path) -> None:
    """Pressed while the engine thinks and images flood in; released by nobody but reset."""
    engine = fake_engine(tmp_path / "engine", latency_s=0.2)
    with process(node_command(engine), world.domain, tmp_path / "log"):
        world.start_policy()
        world.press_e_stop()
        world.wait_holding("stopped until reset: e-stop")
        world.press_e_stop(False)
        world.instruct("another task")
        assert not world.trigger("start").success
        assert world.trigger("reset").success and world.trigger("start").success
        world.wait_moving()


def test_an_e_stop_that_was_pressed_before_the_start_counts(world: World, tmp_path: Path) -> None:
    world.press_e_stop(latched=True)
    with process(node_command(fake_engine(tmp_path / "engine"), enabled=True), world.domain, tmp_path / "log"):
        world.wait_active()
        world.instruct()
        world.wait_chunks()
        world.wait(lambda: "e-stop" in world.diagnostics.get("latch", ""), "the latch")
        assert not world.twists


def test_a_chunk_of_rows_moves_row_by_row(world: World, tmp_path: Path) -> None:
    """Twelve rows of 50 ms from one image; while the engine thinks, the rows of the last chunk are carried out."""
    rows = [[0.05 * (index + 1), 0.0, 0.0, 0.0, 0.0, 0.0, 1.0] for index in range(12)]
    engine = fake_engine(tmp_path / "engine", action=rows, latency_s=0.15, steps=1)
    with process(node_command(engine, blending="soft_mask"), world.domain, tmp_path / "log"):
        world.start_policy()
        chunk = world.chunks[-1]
        assert (chunk.horizon, chunk.action_dim, chunk.steps_per_action) == (12, 7, 1)
        assert list(chunk.actions) == [value for row in rows for value in row] and len(chunk.tokens) == 84
        world.wait(lambda: len({round(twist.twist.linear.x, 6) for _, twist in world.twists}) > 3, "several rows")
        speeds = [twist.twist.linear.x for _, twist in world.twists if twist.twist.linear.x]
        assert min(speeds) >= 0.05 - 1e-9 and max(speeds) <= 0.05 * 12 + 1e-9


@pytest.mark.parametrize("length", [8, 40])
def test_a_slow_engine_goes_on_by_what_was_carried_out(world: World, tmp_path: Path, length: int) -> None:
    """An inference of 0.8 s. Ideal, by definition: k commands after a look, row k of the newest chunk is sent.

    Of 8 rows (0.4 s) each chunk that was looked for while the arm stood still is carried out from its first row to its
    last, and the arm waits; of 40 rows (2 s) the next chunk takes over in the middle.
    """
    rows = [[0.01 * (index + 1), 0.0, 0.0, 0.0, 0.0, 0.0, 1.0] for index in range(length)]
    engine = fake_engine(tmp_path / "engine", action=rows, latency_s=0.8, steps=1)
    command = node_command(engine, inference_deadline=5.0, source_timeout=2.0, chunk_grace=0.0)
    with process(command, world.domain, tmp_path / "log"):
        world.start_policy()
        world.wait(lambda: len([1 for _, twist in world.twists if twist.twist.linear.x]) > 60, "60 commands")
    sent = [
        (Time.from_msg(twist.header.stamp).nanoseconds, round(twist.twist.linear.x / 0.01) - 1)
        for _, twist in world.twists
        if twist.twist.linear.x
    ]
    looks = [Time.from_msg(chunk.observation_stamp).nanoseconds for chunk in world.chunks]
    came = [Time.from_msg(chunk.header.stamp).nanoseconds for chunk in world.chunks]
    stamps = [stamp for stamp, _ in sent]
    first = looks[0]
    for place, (stamp, row) in enumerate(sent):
        # Steps since each look, this one not counted; a stamp that nearly equals the look's may count on either side.
        ideals = set()
        for look, arrived in zip(looks, came, strict=True):
            if arrived <= stamp + 20_000_000 and look >= first:
                early = sum(look - 5_000_000 < other for other in stamps[:place])
                late = sum(look + 5_000_000 < other for other in stamps[:place])
                ideals |= set(range(late, early + 1))
        assert row in ideals, f"command {place} carries out row {row}, possible: {sorted(ideals)}"
    steps = [after - before for (_, before), (_, after) in pairwise(sent)]
    if length == 8:
        assert [row for _, row in sent[:8]] == list(range(8)), "the arm stood still: nothing of the plan had gone by"
        assert {step for step in steps if step != 1} <= {-7}, "each chunk from its first row to its last"
    else:
        assert min(row for _, row in sent[-20:]) > 8, "rows that were carried out while it was thought over are skipped"


def test_position_control_starts_from_the_measured_joints(world: World, tmp_path: Path) -> None:
    """A JointTrajectory contract: slewed from where the joints are, and held where they are, for four commands."""
    joints = tuple(f"joint{index}" for index in range(7))
    content = yaml.safe_load(CONTRACT.read_text())
    content["action"] = {
        "command": "joint_trajectory",
        "topic": "joint_trajectory",
        "control_rate_hz": 20,
        "controller_timeout_s": 0.5,
        "dimensions": [
            {"name": name, "target": name, "unit": "rad", "lower": -2.0, "upper": 2.0, "slew": 1.0} for name in joints
        ],
    }
    path = tmp_path / "contract.yaml"
    path.write_text(yaml.safe_dump(content))
    world.sensors.joints = (*world.sensors.joints, *joints)
    world.sensors.position = [*world.sensors.position, *([0.5] * 7)]
    sent: list[list[float]] = []
    world.node.create_subscription(
        JointTrajectory, "joint_trajectory", lambda message: sent.append(list(message.points[0].positions)), 100
    )
    engine = fake_engine(tmp_path / "engine", action=[1.0] * 7)
    with process(node_command(engine, path), world.domain, tmp_path / "log"):
        world.wait_active()
        world.instruct()
        world.wait_chunks()
        world.enable()
        world.wait(lambda: bool(sent) and sent[-1][0] == pytest.approx(1.0), "the goal")
        assert 0.5 < sent[0][0] <= 0.56, "not a jump: the slew limit starts from the measured position"
        assert world.trigger("stop").success
        chunks = len(world.chunks)
        world.wait(lambda: len(world.chunks) > chunks + 10, "the policy goes on deciding")
        last, *holds = [row[0] for row in sent[-5:]]
        assert last == pytest.approx(1.0), "four holds, then silence: nobody who guides the arm is fought"
        steps = [before - after for before, after in pairwise([last, *holds])]
        assert all(0 < step <= 0.05 + 1e-9 for step in steps), "towards what is measured, within the slew"
