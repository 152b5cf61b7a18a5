"""The policy node as a real process: life, transitions, parameters, refusals, and a clean end."""

import signal
from pathlib import Path

import pytest
import yaml

from tests.core.ros_messages import JOINTS, picture, png
from tests.ros.world import CONTRACT, Sensors, World, end, fake_engine, fresh_domain, node_command, process, two_cameras

from lifecycle_msgs.msg import Transition  # isort: skip  # after the importorskip in tests.ros.world
from rclpy.qos import qos_profile_sensor_data  # isort: skip
from sensor_msgs.msg import CompressedImage  # isort: skip
from std_srvs.srv import SetBool  # isort: skip
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
