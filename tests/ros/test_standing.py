"""What the policy node says of itself in every state, and how it comes up: late cameras, no manager."""

import re
import signal
import time
from pathlib import Path

from tests.ros.world import ROOT, Sensors, World, end, fake_engine, fresh_domain, node_command, process

from lifecycle_msgs.msg import Transition  # isort: skip  # after the importorskip in tests.ros.world
from rclpy.qos import QoSProfile  # isort: skip
from sensor_msgs.msg import CompressedImage, JointState  # isort: skip
from std_srvs.srv import SetBool  # isort: skip


def says(world: World, words: str) -> None:
    """Waits until /diagnostics says so."""
    world.wait(lambda: words in world.diagnostics.get("summary", ""), f"diagnostics that say {words!r}")


def lines(log: Path, words: str) -> int:
    return len(re.findall(re.escape(words), log.read_text()))


def test_every_state_is_told_from_the_start_on(world: World, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(node_command(fake_engine(tmp_path / "engine"), autostart=False), world.domain, log) as node:
        says(world, "unconfigured: autostart is false")
        assert world.set_parameters(contract="/nowhere.yaml").successful
        assert not world.change_state(Transition.TRANSITION_CONFIGURE)
        says(world, "configure refused: /nowhere.yaml")
        contract = str(ROOT / "ros2_ws/src/vla_policy/config/libero.yaml")
        assert world.set_parameters(contract=contract, instruction="x" * 10_000).successful
        assert world.change_state(Transition.TRANSITION_CONFIGURE)
        says(world, "inactive; configured: engine")
        assert not world.change_state(Transition.TRANSITION_ACTIVATE)
        says(world, "activate refused: ")
        assert world.state_label() == "inactive" and not world.chunks
        assert world.change_state(Transition.TRANSITION_CLEANUP)
        says(world, "unconfigured")
        assert world.set_parameters(instruction="pick up the soup").successful
        for transition in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
            assert world.change_state(transition)
        says(world, "holding: disabled")
        assert world.change_state(Transition.TRANSITION_DEACTIVATE)
        says(world, "inactive")
        world.press_e_stop()
        says(world, "stopped until reset: e-stop")
        assert end(node) == 0
    assert lines(log, "activate refused") == 1 and lines(log, "configure refused") == 1, log.read_text()


def test_the_level_follows_the_last_period_and_each_change_is_one_line(world: World, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = node_command(fake_engine(tmp_path / "engine"), source_timeout=2.0, disarm_after=0.0)
    with process(command, world.domain, log):
        world.start_policy()
        says(world, "serving")
        world.sensors.image = b"no image"
        says(world, "in the last period: undecodable")
        world.sensors = Sensors()
        world.wait(lambda: world.diagnostics["summary"] == "serving", "a period without a drop")
        assert int(world.diagnostics["drops undecodable"]) > 0, "the count stays"
        world.wait(lambda: "no more dropped for undecodable" in log.read_text(), "the line that says it is over")
        world.sensors.camera = False
        says(world, "held by a fault: stale_camera (camera/image_raw/compressed)")
        world.sensors = Sensors()
        says(world, "serving")
    assert lines(log, ": undecodable: ") == 1 and lines(log, "held by a fault: stale_camera") == 1, log.read_text()


def test_serving_needs_somebody_who_receives_commands(tmp_path: Path) -> None:
    """An operator who subscribes to no command topic."""
    world = World(fresh_domain(), receives_commands=False)
    try:
        with process(node_command(fake_engine(tmp_path / "engine")), world.domain, tmp_path / "log"):
            world.wait_active()
            world.instruct()
            world.wait_chunks()
            answer = world.call(SetBool, "/policy/enable", SetBool.Request(data=True))
            assert answer.success and "nobody subscribes to /cmd_twist, /gripper_command" in answer.message
            says(world, "commands reach nobody: no subscriber on /cmd_twist, /gripper_command")
    finally:
        world.close()


def test_a_camera_that_comes_late_is_waited_for(world: World, tmp_path: Path) -> None:
    """Under another name first, as a driver that is not up: later than configure waits."""
    log = tmp_path / "log"
    remap = ["-r", "camera/image_raw/compressed:=late/compressed"]
    command = node_command(fake_engine(tmp_path / "engine"), source_wait=0.5)
    with process([*command, *remap], world.domain, log):
        says(world, "waiting for /late/compressed; configures once published")
        assert world.state_label() == "unconfigured", "it answers meanwhile"
        assert lines(log, "/late/compressed: no publisher within 0.5 s") == 1
        world.camera = world.node.create_publisher(CompressedImage, "late/compressed", QoSProfile(depth=10))
        world.wait_active()
        says(world, "holding: disabled")


def test_images_lost_on_the_way_are_counted_under_remaps(tmp_path: Path) -> None:
    """The node stands still while more images come than its queue holds: each is received or counted as lost.

    Under the contract's own names there is no publisher: whoever asks for those finds nothing to compare with.
    """
    world = World(fresh_domain(), rate_hz=None)
    world.node.destroy_publisher(world.camera)
    world.node.destroy_publisher(world.joint_states)
    world.camera = world.node.create_publisher(CompressedImage, "/front/compressed", QoSProfile(depth=10))
    world.joint_states = world.node.create_publisher(JointState, "/arm/joint_states", QoSProfile(depth=50))
    remaps = ["-r", "camera/image_raw/compressed:=/front/compressed", "-r", "joint_states:=/arm/joint_states"]
    command = node_command(fake_engine(tmp_path / "engine"), check_sources="graph", source_timeout=5.0)
    sent_s = 0.0

    def accounted() -> int:
        names = ("received camera/image_raw/compressed", "drops lost_in_transport")
        return sum(int(world.diagnostics.get(name, 0)) for name in names)

    def settled(unheard: int) -> bool:
        """Whether all that was sent is accounted for; if not sends one more now and then, which shows a gap."""
        nonlocal sent_s
        if accounted() > 0 and accounted() == world.published - unheard:
            return True
        if time.monotonic() - sent_s > 0.5:
            sent_s = time.monotonic()
            world.sense()
        return False

    try:
        with process([*command, *remaps], world.domain, tmp_path / "log") as node:
            world.wait_active()
            world.instruct()
            world.wait(lambda: settled(0) or accounted() > 0, "the first image")
            age = "age camera/image_raw/compressed (ms)"
            world.wait(lambda: float(world.diagnostics[age]) > 2000, "a report with nothing under way")
            unheard = world.published - accounted()  # sent before the node was there to hear
            assert "drops lost_in_transport" not in world.diagnostics
            node.send_signal(signal.SIGSTOP)
            for _ in range(100):
                world.sense()
            node.send_signal(signal.SIGCONT)
            world.wait(lambda: "drops lost_in_transport" in world.diagnostics and settled(unheard), "the loss")
            assert "never arrived on camera/image_raw/compressed" in world.diagnostics["last lost_in_transport"]
            assert world.chunks, "decided upon, with the remapped state"
    finally:
        world.close()
