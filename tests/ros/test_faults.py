"""Faults, each with real processes: what the node did, what it published, and that nothing else was lost."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.core.hostile_images import HOSTILE
from tests.core.ros_messages import picture, png
from tests.ros.world import (
    CONTRACT,
    ROOT,
    WRIST,
    Sensors,
    World,
    end,
    fake_engine,
    fresh_domain,
    node_command,
    process,
    two_cameras,
)

from lifecycle_msgs.msg import Transition  # isort: skip  # after the importorskip in tests.ros.world


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A configured policy node for one fault after the other; its timeouts are short, the waits generous."""
    folder = tmp_path_factory.mktemp("faults")
    world = World(fresh_domain())
    world.engine, world.log = fake_engine(folder / "engine"), folder / "log"
    command = node_command(world.engine, autostart=False, source_timeout=0.5, freeze_timeout=0.6, disarm_after=0.0)
    with process(command, world.domain, world.log) as node:
        assert world.change_state(Transition.TRANSITION_CONFIGURE), world.log.read_text()
        yield world
        assert node.poll() is None and end(node) == 0, world.log.read_text()
    world.close()


@pytest.fixture
def running(configured: World) -> Iterator[World]:
    """The node activated anew and moving the robot; in the end it has answered or counted every image."""
    world = configured
    world.sensors = Sensors()
    fake_engine(world.engine)
    assert world.change_state(Transition.TRANSITION_ACTIVATE)
    try:
        assert world.trigger("reset").success  # of a latch that a failed test left
        world.diagnostics.clear()
        world.start_policy()
        yield world
        world.wait_accounted()
    finally:
        assert world.change_state(Transition.TRANSITION_DEACTIVATE)


def test_camera_stops_and_returns(running: World) -> None:
    running.sensors.camera = False
    running.wait_holding("stale_camera")
    running.sensors.camera = True
    running.wait_moving()


def test_one_of_two_cameras_stops_and_returns(world: World, tmp_path: Path) -> None:
    """Nothing moves on half of what the policy looks at, and the camera is named."""
    contract, log = two_cameras(tmp_path / "contract.yaml"), tmp_path / "log"
    with process(node_command(fake_engine(tmp_path / "engine", images=2), contract), world.domain, log) as node:
        world.start_policy()
        world.sensors.wrist = False
        world.wait_holding("stale_camera")
        assert world.diagnostics[f"fault {WRIST['topic']}"] == "stale_camera"
        world.wait_dropped("unsynchronised", f"nearest message on {WRIST['topic']} is")
        world.sensors.wrist = True
        world.wait_moving()
        assert end(node) == 0, log.read_text()


def test_state_stops_and_returns(running: World) -> None:
    running.sensors.state = False
    running.wait_holding("stale_state")
    running.wait_dropped("unsynchronised", "nearest message on joint_states is")
    running.sensors.state = True
    running.wait_moving()


def test_camera_freezes_with_new_stamps(running: World) -> None:
    running.sensors.frozen = True
    running.wait_holding("frozen_camera")
    running.sensors.frozen = False
    running.wait_moving()


@pytest.mark.parametrize("offset_s", [60, -60])
def test_camera_jumps_in_time(running: World, offset_s: int) -> None:
    running.sensors.camera_offset_ns = offset_s * 10**9
    running.wait_holding("future_stamp" if offset_s > 0 else "stale_camera")
    running.sensors.camera_offset_ns = 0
    running.wait_moving()
    assert int(running.diagnostics["drops unsynchronised"]) > 0


def test_image_that_cannot_be_decoded(running: World) -> None:
    running.sensors.image = png(picture(1, 64))[:100]
    running.wait_holding("frozen_camera")  # the same broken bytes again and again
    running.wait_dropped("undecodable", "compressed image ('png', 100 bytes): not a whole JPEG or PNG")
    running.sensors.image = None
    running.wait_moving()


def test_images_that_are_no_pictures_or_claim_too_much(running: World) -> None:
    """Each is counted under its words, none moves the robot or ends the inference, and the next picture is served."""
    for name in ("huge PNG", "huge JPEG", "grey of 16 bits", "depth", "mosaic", "two JPEGs", "animation"):
        hostile = HOSTILE[name]
        running.sensors.image, running.sensors.format = hostile.data, hostile.format
        running.wait_dropped("undecodable", hostile.words)
    running.wait_holding("frozen_camera")
    running.sensors.image, running.sensors.format = None, "png"
    running.wait_moving()
    assert running.diagnostics["latch"] == ""


def test_image_of_another_size_or_encoding(world: World, tmp_path: Path) -> None:
    """A raw camera whose contract declares 16x16: what does not fit is refused by name and moves nothing."""
    content = yaml.safe_load(CONTRACT.read_text())
    content["cameras"] = [
        {"name": "front", "topic": "camera/image_raw", "type": "sensor_msgs/msg/Image", "width": 16, "height": 16}
    ]
    contract = tmp_path / "contract.yaml"
    contract.write_text(yaml.safe_dump(content))
    with process(node_command(fake_engine(tmp_path / "engine"), contract), world.domain, tmp_path / "log") as node:
        world.start_policy()
        world.sensors.side = 32
        world.wait_holding("stale_camera")
        world.wait_dropped("invalid_message", "camera/image_raw: expected 16x16, got 32x32")
        world.sensors.side = 16
        world.wait_moving()
        world.sensors.encoding = "16UC3"
        world.wait_holding("no_chunk")
        world.wait_dropped("undecodable", "image encoding '16UC3' is not supported; publish rgb8")
        world.sensors.encoding = "rgb8"
        world.wait_moving()
        assert end(node) == 0


def test_state_that_is_not_finite(running: World) -> None:
    running.sensors.position = [0.1, float("nan"), 0.3, 0.04]
    running.wait_holding("stale_state")
    running.wait_dropped("invalid_message", "joint_states: state y is not finite")
    running.sensors.position = [0.1, 0.2, 0.3, 0.04]
    running.wait_moving()


def test_joint_missing(running: World) -> None:
    joints = running.sensors.joints
    running.sensors.joints = joints[:3]
    running.wait_holding("stale_state")
    running.wait_dropped("invalid_message", "joint_states: joint 'gripper' is missing; the message names")
    assert "joint 'gripper' is missing" in running.log.read_text(), "the log names it beside the more frequent drops"
    running.sensors.joints = joints
    running.wait_moving()


@pytest.mark.parametrize("text", ["", "x" * 10_000])
def test_instruction_empty_or_endless(running: World, text: str) -> None:
    running.instruct(text)
    running.wait_holding("refused_instruction" if text else "no_instruction")
    if text:
        running.wait_dropped("invalid_message", "instruction of 10000 characters; at most 500 are allowed")
    running.instruct("pick up the butter")
    running.wait_moving()
    assert running.chunks[-1].instruction == "pick up the butter"


def test_inference_slower_than_its_deadline(running: World) -> None:
    fake_engine(running.engine, latency_s=0.7)
    running.wait(lambda: int(running.diagnostics.get("decisions late", 0)) > 1, "counted late decisions")
    running.wait(lambda: "deadline_missed" in running.diagnostics["holding"], "the reason")
    running.wait(lambda: int(running.diagnostics.get("drops superseded", 0)) > 0, "counted superseded frames")
    rate = "rate camera/image_raw/compressed (Hz)"
    running.wait(lambda: float(running.diagnostics[rate]) > 10, "images taken at their rate while the engine is busy")
    running.wait(lambda: not running.moving, "a hold")
    fake_engine(running.engine)
    running.wait_moving()


def test_action_that_is_not_finite_latches(running: World) -> None:
    fake_engine(running.engine, action=[float("nan")] * 7)
    running.wait_holding("not finite")
    fake_engine(running.engine)
    running.wait_chunks(10)
    assert not running.moving, "only the operator takes the latch back"
    assert running.trigger("reset").success and running.trigger("start").success
    running.wait_moving()


def test_action_beyond_the_limits_is_slowed(running: World) -> None:
    fake_engine(running.engine, action=[30.0, 40.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    running.wait(lambda: 0.0 in running.gripper[-1:], "the new action")
    running.wait_moving()
    twist = running.twists[-1][1].twist.linear
    assert (twist.x, twist.y) == (pytest.approx(1.125), pytest.approx(1.5)), "direction kept, both within their limits"
    running.wait(lambda: int(running.diagnostics.get("commands limited", 0)) > 0, "the count of limited commands")


def test_an_engine_that_fails_holds_for_good(world: World, tmp_path: Path) -> None:
    engine = fake_engine(tmp_path / "engine")
    with process(node_command(engine), world.domain, tmp_path / "log") as node:
        world.start_policy()
        fake_engine(engine, fail_after=1)
        world.wait_holding("the engine failed")
        assert "the fake engine fails as told" in (tmp_path / "log").read_text()
        assert end(node) == 0


def test_clock_jumps_back(tmp_path: Path) -> None:
    world = World(fresh_domain(), use_sim_time=True)
    try:
        command = node_command(fake_engine(tmp_path / "engine"), use_sim_time=True, output_watchdog_timeout=5.0)
        with process(command, world.domain, tmp_path / "log") as node:
            world.start_policy()
            assert world.sim_time_ns is not None
            world.sim_time_ns -= 500 * 10**9
            world.wait_dropped("clock_jump", "stamp went back by")
            world.wait_moving()
            assert world.chunks[-1].observation_stamp.sec < 900
            assert end(node) == 0
    finally:
        world.close()


def test_simulated_clock_stands_still(tmp_path: Path) -> None:
    world = World(fresh_domain(), use_sim_time=True)
    try:
        command = node_command(fake_engine(tmp_path / "engine"), use_sim_time=True, output_watchdog_timeout=1.0)
        with process(command, world.domain, tmp_path / "log"):
            world.start_policy()
            world.fall_silent()
            world.wait(lambda: not world.moving, "the watchdog's hold")
            world.wait(lambda: int(world.diagnostics["watchdog holds"]) > 0, "its count")
    finally:
        world.close()


def test_kill_and_restart(world: World, tmp_path: Path) -> None:
    command = node_command(fake_engine(tmp_path / "engine"), enabled=True)
    with process(command, world.domain, tmp_path / "log") as node:
        world.start_policy()
        node.send_signal(signal.SIGKILL)
        node.wait()
    count, commands = len(world.chunks), len(world.twists)
    with process(command, world.domain, tmp_path / "log2"):
        world.wait(lambda: "no_instruction" in world.diagnostics.get("holding", ""), "the successor, which waits")
        assert len(world.twists) == commands, "it did not move, so there is nothing that it has to end"
        world.instruct()
        world.wait(lambda: len(world.chunks) > count, "chunks of the successor")
        world.wait_moving()
        assert world.chunks[count].sequence == 0


def test_two_nodes_with_one_name(world: World, tmp_path: Path) -> None:
    command = node_command(fake_engine(tmp_path / "engine"))
    with process(command, world.domain, tmp_path / "log") as first:
        world.start_policy()
        log = tmp_path / "second.log"
        with process(command, world.domain, log):
            world.wait(lambda: "configure refused" in log.read_text(), "the refusal")
            assert "another process on this machine runs a policy node of this name" in log.read_text()
        world.wait_moving()
        assert first.poll() is None


def test_publisher_dies_and_returns(tmp_path: Path) -> None:
    """The sensors are a process of their own, killed without a farewell."""
    world = World(fresh_domain())
    world.sensors.camera = world.sensors.state = False
    publisher = [sys.executable, str(ROOT / "tests/ros/sensor_process.py")]
    try:
        command = node_command(fake_engine(tmp_path / "engine"), disarm_after=0.0)  # a process may take long to start
        with process(command, world.domain, tmp_path / "log"):
            with process(publisher, world.domain, tmp_path / "sensors.log") as sensors:
                world.start_policy()
                sensors.send_signal(signal.SIGKILL)
                world.wait_holding("stale_camera")
            with process(publisher, world.domain, tmp_path / "sensors.log"):
                world.wait_moving()
    finally:
        world.close()
