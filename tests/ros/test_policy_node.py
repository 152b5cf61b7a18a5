"""The policy node as a real process: life, dry run, motion, stop, runs, and a clean end."""

import itertools
import signal
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tests.core.ros_messages import JOINTS, picture, png
from tests.ros.world import CONTRACT, Sensors, World, end, fake_engine, fresh_domain, node_command, process, two_cameras

from builtin_interfaces.msg import Duration  # isort: skip  # after the importorskip in tests.ros.world
from geometry_msgs.msg import TwistStamped  # isort: skip
from lifecycle_msgs.msg import Transition  # isort: skip
from rclpy.action import ActionClient  # isort: skip
from rclpy.qos import qos_profile_sensor_data  # isort: skip
from rclpy.time import Time  # isort: skip
from sensor_msgs.msg import CompressedImage, JointState  # isort: skip
from std_msgs.msg import Empty, Float64MultiArray  # isort: skip
from std_srvs.srv import SetBool  # isort: skip
from trajectory_msgs.msg import JointTrajectory  # isort: skip
from vla_policy_interfaces.action import RunPolicy  # isort: skip
from vla_policy_interfaces.srv import SetInstruction  # isort: skip


def test_dry_run_enable_stop_reset_start(world: World, tmp_path: Path) -> None:
    with process(node_command(fake_engine(tmp_path / "engine")), world.domain, tmp_path / "log"):
        world.wait_active()
        world.instruct()
        world.wait_chunks(5)
        assert not world.twists and not world.gripper, "the dry run must not command"
        chunk = world.chunks[-1]
        assert (chunk.horizon, chunk.action_dim, chunk.steps_per_action) == (1, 7, 4)
        assert chunk.instruction == "pick up the soup" and chunk.names[0] == "dx" and len(chunk.engine_id) == 64
        world.enable()
        world.wait_moving()
        assert world.twists[-1][1].twist.linear.x == pytest.approx(0.5)
        assert world.twists[-1][1].header.frame_id == "world"
        world.wait(lambda: world.gripper, "the gripper's command, on a topic of its own")
        assert world.gripper[-1] == pytest.approx(0.08)
        assert world.trigger("stop").success
        world.wait_holding("stop_latched")
        assert not world.trigger("start").success
        assert world.trigger("reset").success
        world.wait_holding("not_started")
        assert world.trigger("start").success
        world.wait_moving()
        world.enable(False)
        world.wait(lambda: not world.moving, "the hold that ends motion")
        world.wait_chunks(15)
        speeds = [twist.twist.linear.x for _, twist in world.twists]
        assert speeds[-5:] == pytest.approx([0.5, 0.0, 0.0, 0.0, 0.0]), "four holds, then silence"


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_signal_ends_with_the_hold_and_exit_code_zero(world: World, tmp_path: Path, signals: list[int]) -> None:
    log = tmp_path / "log"
    with process(node_command(fake_engine(tmp_path / "engine")), world.domain, log) as node:
        world.start_policy()
        for number in signals[:-1]:
            node.send_signal(number)
        assert end(node, signals[-1]) == 0, log.read_text()
        world.wait(lambda: not world.moving, "the hold")
    assert "Traceback" not in log.read_text()


def test_a_signal_ends_a_configure_that_waits(world: World, tmp_path: Path) -> None:
    world.sensors.camera = False
    log = tmp_path / "log"
    with process(node_command(fake_engine(tmp_path / "engine"), source_wait=600.0), world.domain, log) as node:
        world.wait(lambda: world.node.count_subscribers("camera/image_raw/compressed") > 0, "the waiting configure")
        assert end(node) == 0
    assert "configure refused: the process was told to end" in log.read_text() and "Traceback" not in log.read_text()


def test_lifecycle_by_a_manager(world: World, tmp_path: Path) -> None:
    # A decision is always under way, so one arrives after the hold of the deactivation.
    command = node_command(fake_engine(tmp_path / "engine", latency_s=0.15), autostart=False)
    with process(command, world.domain, tmp_path / "log"):
        assert world.state_label() == "unconfigured"
        assert not world.call(SetBool, "/policy/enable", SetBool.Request(data=True)).success
        assert world.change_state(Transition.TRANSITION_CONFIGURE)
        assert world.change_state(Transition.TRANSITION_ACTIVATE)
        world.start_policy()
        assert world.change_state(Transition.TRANSITION_DEACTIVATE)
        world.wait(lambda: not world.moving, "the hold on deactivation")
        count, commands = len(world.chunks), len(world.twists)
        assert world.change_state(Transition.TRANSITION_CLEANUP)
        assert world.state_label() == "unconfigured" and len(world.chunks) - count <= 1
        assert not world.moving and len(world.twists) == commands, "the hold is the last word"
        assert world.change_state(Transition.TRANSITION_CONFIGURE)
        assert world.change_state(Transition.TRANSITION_ACTIVATE)
        world.wait_active()
        world.instruct()
        world.wait_chunks()
        assert not world.moving, "a new activation begins disabled"


def test_a_latched_stop_outlives_a_new_activation(world: World, tmp_path: Path) -> None:
    with process(node_command(fake_engine(tmp_path / "engine"), enabled=True), world.domain, tmp_path / "log"):
        world.start_policy()
        assert world.trigger("stop").success
        for transition in (Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_ACTIVATE):
            assert world.change_state(transition)
        world.wait_active()
        world.instruct()
        world.wait_holding("stop_latched")
        assert not world.trigger("start").success
        assert world.trigger("reset").success and world.trigger("start").success
        world.wait_moving()


def test_a_transition_that_the_state_does_not_allow_is_refused(world: World, tmp_path: Path) -> None:
    command = node_command(fake_engine(tmp_path / "engine"), autostart=False)
    with process(command, world.domain, tmp_path / "log") as node:
        assert not world.change_state(Transition.TRANSITION_ACTIVATE)
        assert world.state_label() == "unconfigured"
        assert world.change_state(Transition.TRANSITION_UNCONFIGURED_SHUTDOWN)
        assert world.state_label() == "finalized"
        assert not world.change_state(Transition.TRANSITION_CONFIGURE)
        assert end(node) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_an_engine_whose_runtime_raises_leaves_nothing_behind(world: World, tmp_path: Path) -> None:
    engine = fake_engine(tmp_path / "engine", fail_load=True)
    with process(node_command(engine, autostart=False), world.domain, tmp_path / "log"):
        assert not world.change_state(Transition.TRANSITION_CONFIGURE)
        assert "the fake engine's runtime raises as told" in (tmp_path / "log").read_text()
        assert world.state_label() == "unconfigured"
        fake_engine(engine)
        assert world.change_state(Transition.TRANSITION_CONFIGURE)


def test_parameters_are_fixed_while_configured(world: World, tmp_path: Path) -> None:
    """A value that would be accepted without any effect is refused."""
    command = node_command(fake_engine(tmp_path / "engine"), autostart=False)

    with process(command, world.domain, tmp_path / "log"):
        assert world.set_parameters(source_timeout=0.4).successful
        assert world.change_state(Transition.TRANSITION_CONFIGURE)
        refused = world.set_parameters(source_timeout=0.3)
        assert not refused.successful and "read at configure" in refused.reason
        assert world.change_state(Transition.TRANSITION_CLEANUP)
        assert world.set_parameters(source_timeout=0.3).successful


def test_quality_of_service_given_by_parameters_counts_at_configure(world: World, tmp_path: Path) -> None:
    """A best-effort camera under a contract that asks for reliable delivery: refused, unless overridden."""
    content = yaml.safe_load(CONTRACT.read_text())
    content["cameras"][0] |= {"topic": "radio/compressed", "qos": {"reliability": "reliable"}}
    contract = tmp_path / "contract.yaml"
    contract.write_text(yaml.safe_dump(content))
    camera = world.node.create_publisher(CompressedImage, "radio/compressed", qos_profile_sensor_data)

    def publish() -> None:
        image = CompressedImage(format="png", data=png(picture(world.published, 16)))
        image.header.stamp = world.node.get_clock().now().to_msg()
        camera.publish(image)

    world.node.create_timer(0.05, publish)
    engine, log = fake_engine(tmp_path / "engine"), tmp_path / "log"
    with process(node_command(engine, contract), world.domain, log):
        world.wait(lambda: "configure refused" in log.read_text(), "the refusal")
        assert "world publishes best effort, reliable is asked for" in log.read_text()
    override = {"qos_overrides./radio/compressed.subscription.reliability": "best_effort"}
    with process(node_command(engine, contract, **override), world.domain, log):
        world.start_policy()


def test_configure_refuses_with_the_reason(world: World, tmp_path: Path) -> None:
    """One after the other in one process: a refusal leaves nothing behind, and what is mended is accepted."""
    engine, log = fake_engine(tmp_path / "engine"), tmp_path / "log"
    content = yaml.safe_load(CONTRACT.read_text())
    limits = {"unit": "rad", "lower": -2.0, "upper": 2.0, "slew": 1.0}
    dimensions = [{"name": f"d{i}", "target": f"joint{i}", **limits} for i in range(7)]
    action = {"command": "joint_trajectory", "topic": "arm", "controller_timeout_s": 0.5, "dimensions": dimensions}
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(content | {"action": action}))
    usual = {"engine_path": str(engine), "contract": str(CONTRACT), "blending": "latest"}
    usual |= {"inference_deadline": 0.5, "source_wait": 10.0}

    def refused(reason: str, slow_s: float = 0.0, sensors: Sensors | None = None, **parameters: object) -> None:
        fake_engine(engine, latency_s=slow_s)
        world.sensors = sensors or Sensors()
        assert world.set_parameters(**{**usual, **parameters}).successful
        seen = len(log.read_text())
        assert not world.change_state(Transition.TRANSITION_CONFIGURE)
        said = log.read_text()[seen:]
        assert "configure refused" in said and reason in said and world.state_label() == "unconfigured"

    with process(node_command(engine, autostart=False), world.domain, log):
        refused("no manifest.json", engine_path="/nowhere")
        refused("cannot be read", contract="/nowhere.yaml")
        refused("expected one of latest, ensemble, soft_mask", blending="average")
        refused("above inference_deadline 50.0 ms", slow_s=0.2, inference_deadline=0.05)
        refused("no message within 2 s, though it has a publisher", sensors=Sensors(camera=False), source_wait=2.0)
        refused("joint 'gripper' is missing", sensors=Sensors(joints=JOINTS[:3]))
        refused("not a whole JPEG or PNG", sensors=Sensors(image=b"no image"))
        two = str(two_cameras(tmp_path / "two.yaml"))
        refused("the policy takes 1, the contract gives 2 (agentview, wrist)", contract=two)
        refused("no joint state names joint0, joint1", contract=str(tmp_path / "arm.yaml"))
        world.sensors = Sensors()
        assert world.set_parameters(**usual).successful and world.change_state(Transition.TRANSITION_CONFIGURE)
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("value", [-1.0, 1, "soon"])
def test_a_parameter_outside_its_range_or_type_is_refused(tmp_path: Path, value: object) -> None:
    log = tmp_path / "log"
    command = node_command(fake_engine(tmp_path / "engine"), source_timeout=value)
    with process(command, fresh_domain(), log) as node:
        assert node.wait(30) == 2
    assert "source_timeout" in log.read_text() and "Traceback" not in log.read_text()


def test_a_misspelt_parameter_is_refused_and_a_foreign_one_warned_of(world: World, tmp_path: Path) -> None:
    """On the command line and in a parameter file alike."""
    log, engine, file = tmp_path / "log", fake_engine(tmp_path / "engine"), tmp_path / "params.yaml"
    for name, hint in (
        ("sorce_timeout", "source_timeout"),
        ("diagnostic_updater.periode", "diagnostic_updater.period"),
    ):
        file.write_text(yaml.safe_dump({"/**": {"ros__parameters": {name: 0.4}}}))
        for command in (node_command(engine, **{name: 0.4}), [*node_command(engine), "--params-file", str(file)]):
            log.write_text("")
            with process(command, world.domain, log) as node:
                assert node.wait(30) == 2
            assert f"error: parameter '{name}' is unknown; did you mean '{hint}'?" in log.read_text()
    file.write_text(yaml.safe_dump({"/**": {"ros__parameters": {"robot_description": "..."}}}))
    with process([*node_command(engine), "--params-file", str(file)], world.domain, log):
        world.wait_active()
    assert "parameter 'robot_description' is unknown and has no effect" in log.read_text()


class Runs:
    """A client of the running node's action."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._client = ActionClient(world.node, RunPolicy, "/policy/run_policy")
        self.feedback: list[RunPolicy.Feedback] = []
        world.wait(self._client.server_is_ready, "the action server")

    def begin(self, prompt: str = "pick up the soup", seconds: int = 60, client_timeout: int = 0):
        goal = RunPolicy.Goal(
            prompt=prompt, time_limit=Duration(sec=seconds), client_timeout=Duration(sec=client_timeout)
        )
        future = self._client.send_goal_async(goal, lambda message: self.feedback.append(message.feedback))
        self._world.wait(future.done, "the goal's acceptance")
        return future.result()

    def end(self, goal) -> RunPolicy.Result:
        result = goal.get_result_async()
        self._world.wait(result.done, "the run's end")
        return result.result().result

    def begin_moving(self):
        goal = self.begin()
        self._world.wait_moving()
        return goal

    def code(self, prompt: str = "pick up the soup", seconds: int = 1) -> int:
        return self.end(self.begin(prompt, seconds)).code


def test_run_policy(world: World, tmp_path: Path) -> None:
    codes = RunPolicy.Result
    with process(node_command(fake_engine(tmp_path / "engine")), world.domain, tmp_path / "log"):
        runs = Runs(world)
        world.wait_active()
        assert runs.code() == codes.DISABLED
        world.enable()
        assert runs.code(seconds=0) == codes.INVALID_GOAL
        assert runs.code(" ") == codes.INVALID_GOAL
        assert runs.code("x" * 10_000) == codes.INVALID_GOAL
        done = runs.end(runs.begin(seconds=3))
        assert done.code == codes.TIME_LIMIT_REACHED and done.commands > 5 and done.chunks > 5
        assert done.elapsed.sec == 3 and runs.feedback[-1].chunks > 0
        world.wait_holding("not_started")
        goal = runs.begin_moving()
        assert runs.code("another") == codes.ALREADY_RUNNING
        goal.cancel_goal_async()
        assert runs.end(goal).code == codes.CANCELLED
        goal = runs.begin_moving()
        world.enable(False)
        assert runs.end(goal).code == codes.DISABLED
        world.enable()
        goal = runs.begin_moving()
        assert world.trigger("stop").success
        assert runs.end(goal).code == codes.STOP_LATCHED
        assert runs.code() == codes.STOP_LATCHED
        assert world.trigger("reset").success
        goal = runs.begin_moving()
        world.sensors.camera = False
        result = runs.end(goal)
        assert result.code == codes.STALE_INPUT and "stale_camera" in result.message


def test_run_policy_ends_with_what_ended_the_engine_or_the_node(world: World, tmp_path: Path) -> None:
    codes, engine = RunPolicy.Result, fake_engine(tmp_path / "engine")
    with process(node_command(engine, autostart=False), world.domain, tmp_path / "log"):
        runs = Runs(world)
        assert runs.code() == codes.NOT_ACTIVE
        assert world.change_state(Transition.TRANSITION_CONFIGURE)
        assert world.change_state(Transition.TRANSITION_ACTIVATE)
        world.enable()
        goal = runs.begin_moving()
        fake_engine(engine, latency_s=0.7)
        assert runs.end(goal).code == codes.DEADLINE_MISSED
        fake_engine(engine)
        goal = runs.begin_moving()
        assert world.change_state(Transition.TRANSITION_DEACTIVATE)
        assert runs.end(goal).code == codes.NOT_ACTIVE
        assert world.change_state(Transition.TRANSITION_ACTIVATE)
        world.enable()
        goal = runs.begin_moving()
        fake_engine(engine, fail_after=1)
        result = runs.end(goal)
        assert result.code == codes.ENGINE_FAILED and "the engine failed" in result.message


def test_a_run_owns_its_instruction_and_needs_its_client(world: World, tmp_path: Path) -> None:
    codes = RunPolicy.Result
    with process(node_command(fake_engine(tmp_path / "engine")), world.domain, tmp_path / "log"):
        runs = Runs(world)
        world.wait_active()
        world.enable()
        goal = runs.begin("sort the screws")
        world.wait_moving()
        world.instruct("something else")
        request = SetInstruction.Request(instruction="something else")
        refused = world.call(SetInstruction, "/policy/set_instruction", request)
        assert not refused.success and "a run has its own instruction" in refused.message
        world.wait_dropped("instruction_claimed", "until it ends")
        world.wait_chunks()
        assert world.chunks[-1].instruction == "sort the screws" and world.moving
        goal.cancel_goal_async()
        assert runs.end(goal).code == codes.CANCELLED
        world.wait(lambda: world.chunks[-1].instruction == "something else", "what the topic said meanwhile")

        goal = runs.begin(client_timeout=1)
        heartbeat = world.node.create_publisher(Empty, "/policy/heartbeat", 10)
        beating = world.node.create_timer(0.2, lambda: heartbeat.publish(Empty()))
        world.wait_moving()
        world.wait(lambda: runs.feedback[-1].elapsed.sec >= 2, "a run that outlasts the timeout")
        beating.cancel()
        result = runs.end(goal)
        assert result.code == codes.CLIENT_LOST and "no heartbeat" in result.message
        world.wait_holding("not_started")

        goal = runs.begin(seconds=4)
        world.wait_moving()
        world.instruct("")  # nothing comes of it: a run that was never redirected ends by its time
        assert runs.end(goal).code == codes.TIME_LIMIT_REACHED


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


def test_a_client_that_is_killed_stops_the_motion(world: World, tmp_path: Path) -> None:
    client = [sys.executable, "-c", KILLED_CLIENT]
    with process(node_command(fake_engine(tmp_path / "engine")), world.domain, tmp_path / "log"):
        world.wait_active()
        world.enable()
        with process(client, world.domain, tmp_path / "client") as child:
            world.wait_moving()
            child.kill()
            child.wait()
        world.wait_holding("not_started")


KILLED_CLIENT = """
import rclpy
from builtin_interfaces.msg import Duration
from rclpy.action import ActionClient
from std_msgs.msg import Empty
from vla_policy_interfaces.action import RunPolicy

rclpy.init()
node = rclpy.create_node("client")
client = ActionClient(node, RunPolicy, "/policy/run_policy")
heartbeat = node.create_publisher(Empty, "/policy/heartbeat", 10)
node.create_timer(0.2, lambda: heartbeat.publish(Empty()))
client.wait_for_server()
client.send_goal_async(
    RunPolicy.Goal(prompt="go", time_limit=Duration(sec=300), client_timeout=Duration(sec=2)), lambda message: None
)
rclpy.spin(node)
"""


def test_a_run_that_was_held_does_not_end_as_a_success(world: World, tmp_path: Path) -> None:
    """The camera stutters: each pause is shorter than the run's patience, together they are most of it."""
    with process(node_command(fake_engine(tmp_path / "engine"), source_timeout=0.3), world.domain, tmp_path / "log"):
        runs = Runs(world)
        world.wait_active()
        world.enable()
        goal = runs.begin(seconds=6)
        result = goal.get_result_async()
        stutter = itertools.cycle([False] * 6 + [True])

        def shake() -> None:
            world.sensors.camera = next(stutter)

        world.node.create_timer(0.2, shake)
        world.wait(result.done, "the run's end")
        ended = result.result().result
        assert ended.code == RunPolicy.Result.MOSTLY_HELD and "the robot moved for" in ended.message


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


def test_the_instruction_service(world: World, tmp_path: Path) -> None:
    with process(node_command(fake_engine(tmp_path / "engine")), world.domain, tmp_path / "log"):
        world.wait_active()
        request = SetInstruction.Request(instruction="  open the drawer ")
        response = world.call(SetInstruction, "/policy/set_instruction", request)
        assert response.success and response.message == "open the drawer"
        world.wait_chunks()
        assert world.chunks[-1].instruction == "open the drawer"
        refused = world.call(SetInstruction, "/policy/set_instruction", SetInstruction.Request(instruction="x" * 501))
        assert not refused.success and "at most 500" in refused.message


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
