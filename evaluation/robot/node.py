"""The simulated robot's ROS 2 node.

    python -m evaluation.robot --ros-args -p contract:=contract.yaml -p tasks:="[pick_up_the_butter_...]"

Publishes `/clock`, the contract's camera, joint states at every control step and the instruction at each episode's
start; obeys the contract's twist and gripper commands. Time is the simulation's and continues over episodes. A command
older than `incoming_command_timeout` (simulated seconds) stops the arm. An episode ends with success or after
`max_steps` control steps, by default the suite's.

`driver` "commands" obeys whoever commands. With `lockstep` (the default) simulated time waits after each image for the
decision on that image, and each step for the command that its instant brings, so a slow policy or a busy machine
changes nothing; a policy that stays silent is waited for once, and the steps without a command are counted and told.
Without it the simulation runs at `real_time_factor`. `driver` "expert" lets the scripted expert drive, and publishes
its commands: so bags are recorded.
"""

import io
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from geometry_msgs.msg import TwistStamped
from PIL import Image as PilImage
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, Header, String
from vla_policy_interfaces.msg import ActionChunk

from evaluation.robot import SUMMARY
from evaluation.robot.commands import Commands
from evaluation.robot.robot import CONTROL_PERIOD_NS, SETTLE_STEPS, Episode, LiberoRobot
from vla_policy.core.contract import FLOATS, IMAGE, JOINT_STATE, load_contract
from vla_policy.core.errors import ContractError
from vla_policy.core.events import nanoseconds
from vla_policy.core.files import write_json
from vla_policy.core.outputs import check_file
from vla_policy.core.safety import Command, Limiter
from vla_policy.nodes import declaring
from vla_policy.nodes.declaring import Declared
from vla_policy.nodes.outputs import CHUNK_TOPIC, to_time
from vla_policy.nodes.process import run_node

_START_NS = 10**9
_SETTLE_PERIOD_S = 0.01
DECLARED: dict[str, Declared] = {
    "contract": Declared("", "YAML that maps the robot's topics to the policy's inputs and commands", fixed=True),
    "suite": Declared("libero_object", "LIBERO suite", fixed=True),
    "tasks": Declared([""], "task names; none: all of the suite", fixed=True),
    "trials": Declared([0], "official initial states", fixed=True),
    "driver": Declared("commands", "who drives", choices=("commands", "expert"), fixed=True),
    "lockstep": Declared(True, "simulated time waits for decisions and commands", fixed=True),
    "real_time_factor": Declared(
        1.0, "without lockstep: simulated seconds per second; 0: as fast as it goes", (0.0, 1000.0), fixed=True
    ),
    "steps_per_image": Declared(4, "control steps of 1/20 s from one image to the next", (1, 1000), fixed=True),
    "max_steps": Declared(
        0, "control steps after which an episode ends; 0: as the suite says", (0, 1_000_000), fixed=True
    ),
    "incoming_command_timeout": Declared(
        0.5, "simulated seconds after which a command no longer moves the arm", (0.01, 60.0), fixed=True
    ),
    "min_subscribers": Declared(1, "subscribers that camera, joints and instruction wait for", (0, 100), fixed=True),
    "wait_for_subscribers": Declared(120.0, "seconds to wait for them", (0.0, 3600.0), fixed=True),
    "summary": Declared("", "JSON file for the episodes' outcomes; empty: none", fixed=True),
}


class SimulatedRobotNode(Node):
    """Simulates in a thread of its own, which also owns the renderer; the executor receives the commands."""

    def __init__(self, done: threading.Event) -> None:
        super().__init__("simulated_robot", automatically_declare_parameters_from_overrides=True)
        declaring.declare(self, DECLARED)
        value = declaring.read(self, DECLARED)
        self._contract = load_contract(value["contract"])
        self._suite, self._driver = value["suite"], value["driver"]
        self._tasks, self._trials = value["tasks"], value["trials"]
        self._waits = self._driver == "commands" and value["lockstep"]
        self._real_time_factor = value["real_time_factor"]
        self._steps_per_image, self._max_steps = value["steps_per_image"], value["max_steps"]
        self._command_timeout_ns = round(value["incoming_command_timeout"] * 1e9)
        self._min_subscribers, self._wait_s = value["min_subscribers"], value["wait_for_subscribers"]
        self._summary = value["summary"]
        if self._summary:
            check_file(self._summary, SUMMARY)
        if len(self._contract.cameras) != 1:
            raise ContractError(
                f"{self._contract.path}: the simulated robot has 1 camera, the contract names "
                f"{len(self._contract.cameras)}"
            )
        if self._contract.action.command != "twist" or [item.type for item in self._contract.states] != [JOINT_STATE]:
            raise ContractError(f"{self._contract.path}: the simulated robot takes twists and gives one joint state")
        gripper = self._contract.action.gripper
        if gripper is not None and gripper.type != FLOATS:
            raise ContractError(f"{self._contract.path}: the simulated gripper hears {FLOATS}, not {gripper.type}")
        self._error: Exception | None = None
        self.results: list[dict[str, object]] = []
        self._now_ns = _START_NS
        self._commands = Commands()
        self._create_topics()
        self._done, self._closing = done, threading.Event()
        self._thread = threading.Thread(target=self._run, name="simulation", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the simulation. Raises what ended it early."""
        self._closing.set()
        self._commands.close()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _create_topics(self) -> None:
        contract, action = self._contract, self._contract.action
        kept = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        kind = Image if contract.primary.type == IMAGE else CompressedImage
        # Reliable, so that a recorder or a lossless policy misses nothing; best-effort subscribers are served as well.
        self._camera = self.create_publisher(kind, contract.primary.topic, QoSProfile(depth=10))
        self._joints = self.create_publisher(JointState, contract.states[0].topic, QoSProfile(depth=50))
        self._instruction = self.create_publisher(String, contract.instruction.topic, kept)
        self._clock_publisher = self.create_publisher(ClockMessage, "/clock", QoSProfile(depth=10))
        if self._driver == "commands":
            # Decisions first: where both have come, the executor takes the topics in this order.
            self.create_subscription(ActionChunk, CHUNK_TOPIC, self._on_chunk, QoSProfile(depth=10))
            self.create_subscription(TwistStamped, action.topic, self._on_twist, QoSProfile(depth=10))
            if action.gripper is not None:
                self.create_subscription(
                    Float64MultiArray, action.gripper.topic, self._on_gripper, QoSProfile(depth=10)
                )
        else:
            self._twists = self.create_publisher(TwistStamped, action.topic, QoSProfile(depth=10))
            if action.gripper is not None:
                self._grips = self.create_publisher(Float64MultiArray, action.gripper.topic, QoSProfile(depth=10))

    # --- commands -----------------------------------------------------------------------------------------------

    def _on_twist(self, message: TwistStamped) -> None:
        parts = (("linear", message.twist.linear), ("angular", message.twist.angular))
        values = {f"{part}.{axis}": getattr(vector, axis) for part, vector in parts for axis in "xyz"}
        self._commands.move(values, self._now_ns, nanoseconds(message.header.stamp))

    def _on_gripper(self, message: Float64MultiArray) -> None:
        self._commands.grip(message.data[0] if message.data else None)

    def _on_chunk(self, message: ActionChunk) -> None:
        self._commands.decided(nanoseconds(message.observation_stamp))

    # --- simulation ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            robot = LiberoRobot(self._suite, self._contract.action)
            try:
                self._await_subscribers()
                for task in self._tasks or robot.tasks:
                    for trial in self._trials:
                        if not self._closing.is_set():
                            self._episode(robot, Episode(task, trial))
            finally:
                robot.close()
            if self._summary:
                write_json(self._summary, {"schema_version": 1, "kind": SUMMARY, "episodes": self.results})
        except Exception as error:
            self._error = error
        finally:
            self._done.set()

    def _await_subscribers(self) -> None:
        """Camera and state must be heard by as many as the recording or the policy needs."""
        deadline_s = time.monotonic() + self._wait_s
        for publisher in (self._camera, self._joints, self._instruction):
            while publisher.get_subscription_count() < self._min_subscribers and not self._closing.is_set():
                if time.monotonic() > deadline_s:
                    raise ContractError(
                        f"simulated robot: {publisher.topic_name}: {publisher.get_subscription_count()} of "
                        f"{self._min_subscribers} subscribers within {self._wait_s:g} s; is the policy node active?"
                    )
                self._tick()
                self._closing.wait(0.05)

    def _episode(self, robot: LiberoRobot, episode: Episode) -> None:
        instruction = robot.begin(episode)
        self._commands.forget()
        self._settle()
        self._instruction.publish(String(data=instruction))
        self._settle()
        success, step, max_steps = False, 0, self._max_steps or robot.max_steps
        while not success and step < max_steps and not self._closing.is_set():
            begun_s = time.monotonic()
            self._publish_joints(robot.state())
            if step % self._steps_per_image == 0:
                self._publish_image(robot.observe().image)
                self._decide(robot)
            gripped = None if self._contract.action.gripper is None else self._commands.gripped
            self._advance()
            if self._waits:
                self._commands.await_command(self._now_ns, gripped)
            self._obey(robot)
            success, step = robot.step(), step + 1
            self._pace(begun_s)
        self._instruction.publish(String(data=""))  # the task is over; the same one may come again
        outcome = {"task": episode.task, "trial": episode.trial, "success": success, "steps": step}
        self.results.append(outcome | {"steps_without_command": self._commands.missed})
        self.get_logger().info(f"{episode.task} {episode.trial}: {'success' if success else 'failure'}, {step} steps")
        if missed := self._commands.missed:
            self.get_logger().warning(f"{missed} of these steps had no command: the policy held, or is late")

    def _decide(self, robot: LiberoRobot) -> None:
        """Commands for the image that was just published: the expert's, or in lockstep those of the policy."""
        if self._driver == "expert":
            self._drive(robot.expert())
        elif self._waits:
            self._commands.await_decision(self._now_ns)

    def _drive(self, action: np.ndarray) -> None:
        command = Limiter(self._contract.action).command(action, self._now_ns)
        if command is None:
            raise ContractError(f"simulated robot: the expert's action is not finite: {action.tolist()}")
        motion = dict(zip(command.targets, command.motion.tolist(), strict=True))
        self._commands.move(motion, self._now_ns, self._now_ns)
        self._commands.grip(command.gripper_m)
        self._publish_command(command)

    def _publish_command(self, command: Command) -> None:
        message = TwistStamped(header=self._header(self._contract.action.frame_id))
        for target, value in zip(command.targets, command.motion.tolist(), strict=True):
            part, axis = target.split(".")
            setattr(getattr(message.twist, part), axis, value)
        self._twists.publish(message)
        if command.gripper_m is not None:
            self._grips.publish(Float64MultiArray(data=[command.gripper_m]))

    def _obey(self, robot: LiberoRobot) -> None:
        robot.move(self._commands.twist(self._now_ns, self._command_timeout_ns))
        if (opening_m := self._commands.opening_m) is not None:
            robot.grip(opening_m)

    def _settle(self) -> None:
        """Half a second between episode, instruction and first image, slow enough for everybody's clock to follow."""
        for _ in range(SETTLE_STEPS):
            self._advance()
            self._closing.wait(_SETTLE_PERIOD_S)

    def _advance(self) -> None:
        self._now_ns += CONTROL_PERIOD_NS
        self._tick()

    def _tick(self) -> None:
        self._clock_publisher.publish(ClockMessage(clock=to_time(self._now_ns)))

    def _pace(self, begun_s: float) -> None:
        if self._driver == "commands" and not self._waits and self._real_time_factor > 0:
            self._closing.wait(max(0.0, begun_s + CONTROL_PERIOD_NS / 1e9 / self._real_time_factor - time.monotonic()))

    # --- sensors ------------------------------------------------------------------------------------------------

    def _header(self, frame: str) -> Header:
        return Header(stamp=to_time(self._now_ns), frame_id=frame)

    def _publish_joints(self, state: np.ndarray) -> None:
        """Every joint that the contract names, with the positions and velocities that the simulator gives."""
        measured = dict(zip(self._contract.state_names, state.tolist(), strict=True))
        values = self._contract.states[0].values
        joints = list(dict.fromkeys(value.joint for value in values))
        fields = {(value.joint, value.field): measured[value.name] for value in values}
        self._joints.publish(
            JointState(
                header=self._header(self._contract.action.frame_id),
                name=joints,
                position=[fields.get((joint, "position"), 0.0) for joint in joints],
                velocity=[fields.get((joint, "velocity"), 0.0) for joint in joints],
            )
        )

    def _publish_image(self, image: np.ndarray) -> None:
        header = self._header(self._contract.primary.name)
        height, width, _ = image.shape
        if self._contract.primary.type == IMAGE:
            message = Image(header=header, height=height, width=width, encoding="rgb8", step=3 * width)
            message.data = image.tobytes()
        else:
            stream = io.BytesIO()
            PilImage.fromarray(image).save(stream, "PNG", optimize=True)
            message = CompressedImage(header=header, format="rgb8; png compressed rgb8", data=stream.getvalue())
        self._camera.publish(message)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the episodes. Returns 2 on a mistake, 1 when an episode failed, 0 otherwise."""
    results: list[dict[str, object]] = []

    @contextmanager
    def opened(done: threading.Event) -> Iterator[SimulatedRobotNode]:
        node = SimulatedRobotNode(done)
        try:
            yield node
        finally:
            node.close()
            results.extend(node.results)

    code = run_node(opened, args)
    return code or int(not results or not all(result["success"] for result in results))
