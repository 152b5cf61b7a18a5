"""Grippers: an action instead of a topic, its server's absence, and the choice's hysteresis, with real processes."""

import importlib.util
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.ros.interfaces import installed
from tests.ros.world import CONTRACT, ROOT, World, end, fake_engine, node_command, process

SERVER = [sys.executable, str(ROOT / "tests/ros/gripper_server.py")]


@pytest.fixture(scope="module")
def control_msgs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with installed("control_msgs", tmp_path_factory.mktemp("control_msgs")):
        yield


def with_gripper(path: Path, **gripper: object) -> Path:
    """Writes the shipped contract with another gripper."""
    content = yaml.safe_load(CONTRACT.read_text())
    content["action"]["gripper"] |= gripper
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.skipif(importlib.util.find_spec("control_msgs") is not None, reason="control_msgs is installed here")
def test_a_package_that_is_not_installed_is_one_line(world: World, tmp_path: Path) -> None:
    action = {"type": "control_msgs/action/GripperCommand", "topic": "grip", "max_effort_n": 1}
    contract, log = with_gripper(tmp_path / "contract.yaml", **action), tmp_path / "log"
    with process(node_command(fake_engine(tmp_path / "engine"), contract), world.domain, log):
        world.wait(lambda: "configure refused" in log.read_text(), "the refusal")
    assert "control_msgs is not installed" in log.read_text() and "Traceback" not in log.read_text()


def moved(world: World, engine: Path, value: float) -> None:
    """The policy's choice is `value` from now on."""
    fake_engine(engine, action=[0.5, 0.0, 0.0, 0.0, 0.0, 0.0, value])
    count = len(world.chunks)
    world.wait(lambda: len(world.chunks) > count + 3 and world.chunks[-1].actions[-1] == value, "the new choice")
    world.wait_moving()


def test_an_action_gets_a_goal_when_the_choice_changes(world: World, tmp_path: Path, control_msgs: None) -> None:
    action = {"type": "control_msgs/action/GripperCommand", "topic": "hand/gripper_cmd", "max_effort_n": 12.5}
    contract = with_gripper(tmp_path / "contract.yaml", **action)
    engine, log, asked = fake_engine(tmp_path / "engine"), tmp_path / "log", tmp_path / "asked"
    server = [*SERVER, "hand/gripper_cmd"]
    with process(server, world.domain, asked) as driver, process(node_command(engine, contract), world.domain, log):
        world.wait_active()
        world.instruct()
        world.wait_chunks()
        assert "goal" not in asked.read_text(), "the dry run must not command"
        world.enable()
        world.wait(lambda: "goal" in asked.read_text(), "the first goal")
        world.wait_chunks(10)
        assert asked.read_text() == "goal 0.08 12.5\n", "one goal, however often it is decided"
        moved(world, engine, 1.0)
        world.wait(lambda: asked.read_text() == "goal 0.08 12.5\ngoal 0 12.5\n", "the goal of the other choice")
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        world.wait_holding("no_gripper")
        with process(server, world.domain, asked):
            world.wait(lambda: "no_gripper" not in world.diagnostics["holding"], "the driver's successor", 60)
            assert world.trigger("start").success, "a fault that lasted needs an operator"
            world.wait_moving()
            world.wait(lambda: asked.read_text().count("goal 0 12.5") == 2, "what the successor does not know")


def test_an_action_that_refuses_is_asked_again_and_told(world: World, tmp_path: Path, control_msgs: None) -> None:
    action = {"type": "control_msgs/action/GripperCommand", "topic": "grip", "max_effort_n": 1}
    contract = with_gripper(tmp_path / "contract.yaml", **action)
    command = node_command(fake_engine(tmp_path / "engine"), contract, source_wait=2.0, autostart=False)
    log, asked = tmp_path / "log", tmp_path / "asked"
    with process(command, world.domain, log):
        assert not world.change_state(1)
        assert "/grip: no action server control_msgs/action/GripperCommand within 2 s" in log.read_text()
        with process([*SERVER, "grip", "refuse"], world.domain, asked):
            world.wait(lambda: world.change_state(1), "a configure that finds the driver")
            assert world.change_state(3)
            world.start_policy()
            world.wait(lambda: asked.read_text().count("refused 0.08 1") > 1, "a second try")
    assert "grip: the gripper refused a goal; it is sent again" in log.read_text()


def test_a_choice_near_its_threshold_does_not_chatter(world: World, tmp_path: Path) -> None:
    """Open at 0.08 m for values below -0.2, closed above 0.2; between them as before."""
    contract = with_gripper(tmp_path / "contract.yaml", hysteresis=0.2)
    engine = fake_engine(tmp_path / "engine")
    with process(node_command(engine, contract), world.domain, tmp_path / "log"):
        world.start_policy()
        for value, opening in ((-1.0, 0.08), (0.15, 0.08), (0.25, 0.0), (-0.15, 0.0), (0.1, 0.0), (-0.25, 0.08)):
            moved(world, engine, value)
            count = len(world.gripper)
            world.wait(lambda count=count: len(world.gripper) > count + 2, "its commands")
            assert world.gripper[-1] == pytest.approx(opening), value


def test_another_client_of_the_action_is_seen(world: World, tmp_path: Path, control_msgs: None) -> None:
    """As another publisher of a command topic: a teleoperation that closes the fingers while the policy opens them."""
    action = {"type": "control_msgs/action/GripperCommand", "topic": "grip", "max_effort_n": 1}
    contract = with_gripper(tmp_path / "contract.yaml", **action)
    engine = fake_engine(tmp_path / "engine")
    client = [sys.executable, str(ROOT / "tests/ros/gripper_client.py"), "grip"]
    with (
        process([*SERVER, "grip"], world.domain, tmp_path / "server"),
        process(node_command(engine, contract), world.domain, tmp_path / "log"),
    ):
        world.start_policy()
        assert "other publishers /grip" not in world.diagnostics
        with process(client, world.domain, tmp_path / "client") as teleoperation:
            world.wait(lambda: world.diagnostics.get("other publishers /grip") == "/teleoperation", "its name")
            world.wait_holding("other_publisher")
            end(teleoperation)  # in order, so that the others know it at once
        world.wait(lambda: world.diagnostics["holding"] == "not_started", "a robot that waits for its operator")
