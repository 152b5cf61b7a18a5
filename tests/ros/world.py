"""A robot and an operator for tests with real processes: publishes sensors, collects what the policy node sends."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("rclpy", reason="needs the ROS 2 environment: run under tools/with_ros")
pytest.importorskip("vla_policy_interfaces", reason="needs the built workspace: run `make build`, then tools/with_ros")

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import TwistStamped
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import SetParametersResult
from rcl_interfaces.srv import SetParameters
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.time import Time
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Bool, Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger
from vla_policy_interfaces.msg import ActionChunk

from tests.core.ros_messages import JOINTS, picture, png

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "ros2_ws/src/vla_policy/config/libero.yaml"
WRIST = {"name": "wrist", "topic": "wrist/compressed", "type": "sensor_msgs/msg/CompressedImage"}
FAKE_NODE = [sys.executable, str(ROOT / "tests/ros/fake_policy_node.py")]
# Why an image is not answered; states are only ever refused as invalid or out of order.
IMAGE_DROPS = ("clock_jump", "unsynchronised", "no_instruction", "superseded", "undecodable", "engine_error", "stopped")
os.environ.setdefault("FASTRTPS_DEFAULT_PROFILES_FILE", str(ROOT / "tests/ros/fast_discovery.xml"))
TIMEOUT_S = 90.0  # a busy machine takes long to start a process
_domains = itertools.count()


def fresh_domain() -> int:
    """A ROS domain for one test: no other test's, and most likely nobody else's on this machine."""
    return 1 + (os.getpid() * 13 + next(_domains)) % 100


@contextmanager
def process(command: list[str], domain: int, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A child in the domain, its output in `log`; killed at the end if it still runs."""
    environment = {
        **os.environ,
        "ROS_DOMAIN_ID": str(domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("ab") as stream:
        child = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def two_cameras(path: Path) -> Path:
    """Writes the contract with a wrist camera as well."""
    content = yaml.safe_load(CONTRACT.read_text())
    path.write_text(yaml.safe_dump(content | {"cameras": [*content["cameras"], WRIST]}))
    return path


def node_command(engine: Path, contract: Path = CONTRACT, **parameters: Any) -> list[str]:
    """The policy node with a FakeEngine, as launch would start it."""
    values = {"engine_path": engine, "contract": contract, "autostart": True, **parameters}
    arguments = [item for name, value in values.items() for item in ("-p", f"{name}:={_text(value)}")]
    return [*FAKE_NODE, "--ros-args", "-r", "__node:=policy", *arguments]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass
class Sensors:
    """What the robot publishes; tests change it while it runs."""

    camera: bool = True
    wrist: bool = True
    state: bool = True
    frozen: bool = False
    camera_offset_ns: int = 0
    position: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.04])
    joints: tuple[str, ...] = JOINTS
    image: bytes | None = None
    format: str = "png"
    side: int = 16
    encoding: str = "rgb8"


class World:
    """One robot and its operator in one ROS domain. Every wait is for a condition.

    rate_hz: of the sensors; None leaves it to the test to call `sense`. receives_commands: whether the robot listens.
    """

    def __init__(
        self, domain: int, rate_hz: float | None = 20.0, use_sim_time: bool = False, receives_commands: bool = True
    ) -> None:
        self.domain, self._receives_commands = domain, receives_commands
        self.sensors = Sensors()
        self.engine = self.log = Path(os.devnull)
        self.chunks: list[ActionChunk] = []
        self.twists: list[tuple[float, TwistStamped]] = []
        self.gripper: list[float] = []
        self.diagnostics: dict[str, str] = {}
        self._clients: dict[str, Any] = {}
        self.sim_time_ns = 10**12 if use_sim_time else None
        self._changed = threading.Condition()
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=domain)
        self.node = rclpy.create_node("world", context=self._context)
        self._publish_topics()
        self._subscribe_topics()
        self.published = 0
        self._period_s = None if rate_hz is None else 1 / rate_hz
        self._closing = threading.Event()
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._spin, self._sense)]
        for thread in self._threads:
            thread.start()

    def _publish_topics(self) -> None:
        node = self.node
        self.camera = node.create_publisher(CompressedImage, "camera/image_raw/compressed", QoSProfile(depth=10))
        self.wrist = node.create_publisher(CompressedImage, WRIST["topic"], QoSProfile(depth=10))
        self.raw_camera = node.create_publisher(Image, "camera/image_raw", QoSProfile(depth=10))
        self.joint_states = node.create_publisher(JointState, "joint_states", QoSProfile(depth=50))
        kept = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.instruction = node.create_publisher(String, "instruction", kept)
        if self.sim_time_ns is not None:
            self.clock = node.create_publisher(Clock, "/clock", QoSProfile(depth=10))

    def _subscribe_topics(self) -> None:
        node, deep = self.node, QoSProfile(depth=1000)
        node.create_subscription(ActionChunk, "action_chunk", self._collector(self.chunks.append), deep)
        node.create_subscription(DiagnosticArray, "/diagnostics", self._collector(self._diagnose), deep)
        if not self._receives_commands:
            return
        node.create_subscription(
            TwistStamped, "cmd_twist", self._collector(lambda m: self.twists.append((time.monotonic(), m))), deep
        )
        node.create_subscription(
            Float64MultiArray, "gripper_command", self._collector(lambda m: self.gripper.append(m.data[0])), deep
        )

    def _collector(self, act: Callable[[Any], None]) -> Callable[[Any], None]:
        def collect(message: Any) -> None:
            with self._changed:
                act(message)
                self._changed.notify_all()

        return collect

    def _diagnose(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.diagnostics = {value.key: value.value for value in status.values}
            self.diagnostics["summary"] = status.message

    def _spin(self) -> None:
        with suppress(ExternalShutdownException):
            self._executor.spin()

    def _sense(self) -> None:
        while self._period_s is not None and not self._closing.wait(self._period_s):
            if self.sim_time_ns is not None:
                self.sim_time_ns += round(self._period_s * 1e9)
                self.clock.publish(Clock(clock=Time(nanoseconds=self.sim_time_ns).to_msg()))
            self.sense()

    def now_ns(self) -> int:
        return time.time_ns() if self.sim_time_ns is None else self.sim_time_ns

    def sense(self) -> None:
        """One state and one image, with the same stamp."""
        sensors, now_ns = self.sensors, self.now_ns()
        if sensors.state:
            names = list(sensors.joints)
            joints = JointState(name=names, position=sensors.position[: len(names)], velocity=[0.0] * len(names))
            joints.header.stamp = Time(nanoseconds=now_ns).to_msg()
            self.joint_states.publish(joints)
        if sensors.camera:
            number = 0 if sensors.frozen else self.published
            self.published += 1
            image = CompressedImage(format=sensors.format, data=sensors.image or png(picture(number, 16)))
            image.header.stamp = Time(nanoseconds=now_ns + sensors.camera_offset_ns).to_msg()
            self.camera.publish(image)
            if sensors.wrist and self.wrist.get_subscription_count():
                self.wrist.publish(CompressedImage(header=image.header, format="png", data=png(picture(number, 8))))
            if self.raw_camera.get_subscription_count():
                side = sensors.side
                raw = Image(header=image.header, height=side, width=side, encoding=sensors.encoding, step=3 * side)
                raw.data = picture(number, side).tobytes()
                self.raw_camera.publish(raw)

    def instruct(self, text: str = "pick up the soup") -> None:
        self.instruction.publish(String(data=text))

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Until `condition` holds; fails the test with what was seen instead."""
        with self._changed:
            deadline = time.monotonic() + timeout_s
            while not condition():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    speed = self.twists[-1][1].twist.linear.x if self.twists else None
                    pytest.fail(
                        f"waited {timeout_s:g} s for {what}; {len(self.chunks)} chunks, {len(self.twists)} twists, "
                        f"last speed {speed}, diagnostics {self.diagnostics}"
                    )
                self._changed.wait(min(left_s, 0.05))

    def wait_chunks(self, more: int = 3) -> None:
        start = len(self.chunks)
        self.wait(lambda: len(self.chunks) >= start + more, f"{more} more chunks")

    @property
    def moving(self) -> bool:
        """Whether the newest command is motion."""
        return bool(self.twists) and self.twists[-1][1].twist.linear.x != 0

    def wait_moving(self) -> None:
        start = len(self.twists)
        self.wait(lambda: len(self.twists) > start and self.moving, "motion")

    def wait_holding(self, reason: str) -> None:
        """Until the newest command is a hold and the diagnostics name the reason."""
        self.wait(lambda: not self.moving, f"a hold ({reason})")
        self.wait(lambda: reason in " ".join(self.diagnostics.values()), f"diagnostics that name {reason}")
        assert not self.moving

    def wait_dropped(self, reason: str, words: str) -> None:
        """Until the diagnostics count drops for the reason and give these particulars."""
        self.wait(lambda: words in self.diagnostics.get(f"last {reason}", ""), f"{words!r} under last {reason}")
        assert int(self.diagnostics[f"drops {reason}"]) > 0

    def wait_accounted(self) -> None:
        """Until every image that the node has received is decided upon or counted as dropped; ends the images."""
        self.sensors.camera = False

        def accounted() -> bool:
            values = self.diagnostics
            drops = sum(int(values.get(f"drops {reason}", 0)) for reason in IMAGE_DROPS)
            images = int(values.get("received camera/image_raw/compressed", -1))
            return images == int(values.get("chunks", 0)) + drops

        self.wait(accounted, "each image's answer or drop")

    def call(self, kind: type, name: str, request: Any) -> Any:
        """A service call's response; asked again when the server had not yet discovered where to answer."""
        if name not in self._clients:
            self._clients[name] = self.node.create_client(kind, name)
        client = self._clients[name]
        self.wait(client.service_is_ready, f"service {name}")
        futures = []
        for _ in range(3):
            futures.append(client.call_async(request))
            futures[-1].add_done_callback(self._collector(lambda future: None))
            with self._changed:
                self._changed.wait_for(lambda: any(future.done() for future in futures), TIMEOUT_S / 3)
            for future in futures:
                if future.done():
                    return future.result()
        pytest.fail(f"{name} did not answer")

    def enable(self, enabled: bool = True) -> None:
        assert self.call(SetBool, "/policy/enable", SetBool.Request(data=enabled)).success

    def trigger(self, service: str) -> Trigger.Response:
        return self.call(Trigger, f"/policy/{service}", Trigger.Request())

    def state_label(self) -> str:
        return self.call(GetState, "/policy/get_state", GetState.Request()).current_state.label

    def change_state(self, transition: int) -> bool:
        request = ChangeState.Request()
        request.transition.id = transition
        return self.call(ChangeState, "/policy/change_state", request).success

    def set_parameters(self, **values: Any) -> SetParametersResult:
        """The first refusal, or the last acceptance."""
        parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        request = SetParameters.Request(parameters=parameters)
        results = self.call(SetParameters, "/policy/set_parameters", request).results
        return next((result for result in results if not result.successful), results[-1])

    def wait_active(self) -> None:
        # Matched, not only known to the graph: what is said before is lost.
        self.wait(lambda: self.instruction.get_subscription_count() > 0, "the active policy node")

    def press_e_stop(self, pressed: bool = True, latched: bool = False) -> None:
        """Publishes on the topic once it is heard; `latched` as a driver that keeps its last word for late joiners."""
        kept = DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE
        publisher = self.node.create_publisher(Bool, "e_stop", QoSProfile(depth=1, durability=kept))
        self.wait(lambda: latched or publisher.get_subscription_count() > 0, "somebody who hears the e-stop")
        publisher.publish(Bool(data=pressed))

    def start_policy(self) -> None:
        """Instructs, enables, and waits until the robot moves."""
        self.wait_active()
        self.instruct()
        self.wait_chunks()
        self.enable()
        self.wait_moving()

    def fall_silent(self) -> None:
        """No sensors and no clock any more."""
        self._closing.set()

    def close(self) -> None:
        self._closing.set()
        self._threads[1].join()
        self._executor.shutdown()
        self._threads[0].join(5)
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)


def fake_engine(folder: Path, **settings: Any) -> Path:
    """An engine folder for the FakeEngine: half speed along x and an open gripper unless told otherwise."""
    import json

    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text("{}")
    settings = {"action": [0.5, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0], **settings}
    temporary = folder / "fake.json.tmp"
    temporary.write_text(json.dumps(settings))
    temporary.replace(folder / "fake.json")
    return folder


def end(child: "subprocess.Popen[bytes]", number: int = signal.SIGTERM) -> int:
    """Sends a signal and returns the exit status."""
    child.send_signal(number)
    return child.wait(TIMEOUT_S)
