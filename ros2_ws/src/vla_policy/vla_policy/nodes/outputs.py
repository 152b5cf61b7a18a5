"""Decisions and commands as messages."""

from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import TwistStamped
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile
from std_msgs.msg import Header
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint
from vla_policy_interfaces.msg import ActionChunk

from vla_policy.core.contract import Contract
from vla_policy.core.safety import Command
from vla_policy.core.server import ServedChunk
from vla_policy.nodes import rivals
from vla_policy.nodes.gripper import GripperAction, GripperTopic, make_gripper

CHUNK_TOPIC = "action_chunk"


def to_time(stamp_ns: int) -> Time:
    return Time(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)


def to_duration(span_ns: int) -> Duration:
    return Duration(sec=span_ns // 10**9, nanosec=span_ns % 10**9)


class Outputs:
    """The node's lifecycle publishers: silent unless the node is active."""

    def __init__(self, node: LifecycleNode, contract: Contract, engine_id: str, queue_size: int) -> None:
        self._node, self._contract, self._engine_id = node, contract, engine_id
        action = contract.action
        kind = TwistStamped if action.command == "twist" else JointTrajectory
        self._chunks = node.create_lifecycle_publisher(ActionChunk, CHUNK_TOPIC, QoSProfile(depth=queue_size))
        self._commands = node.create_lifecycle_publisher(kind, action.topic, QoSProfile(depth=1))
        self._gripper = None if action.gripper is None else make_gripper(node, action.gripper)

    def destroy(self) -> None:
        if self._gripper is not None:
            self._gripper.destroy()
        for publisher in (self._chunks, self._commands):
            self._node.destroy_lifecycle_publisher(publisher)

    def rivals(self) -> dict[str, str]:
        """Other nodes that command: their names by topic, or by the gripper's action."""
        gripper = self._gripper
        own = [self._commands, *([gripper.publisher] if isinstance(gripper, GripperTopic) else [])]
        found = rivals.publishers(self._node, own)
        return found | rivals.action_clients(self._node, gripper.name) if isinstance(gripper, GripperAction) else found

    @property
    def gripper_ready(self) -> bool:
        return self._gripper is None or self._gripper.ready

    def chunk(self, chunk: ServedChunk) -> None:
        """The decision, whether or not it may move the robot."""
        horizon, width = chunk.actions.shape
        self._chunks.publish(
            ActionChunk(
                header=self._header(),
                observation_stamp=to_time(chunk.frame.stamp_ns),
                sequence=chunk.sequence,
                horizon=horizon,
                action_dim=width,
                actions=chunk.actions.reshape(-1).tolist(),
                names=[dimension.name for dimension in self._contract.action.dimensions],
                steps_per_action=chunk.steps_per_action,
                tokens=chunk.tokens.reshape(-1).tolist(),
                instruction=chunk.frame.instruction,
                engine_id=self._engine_id,
                latency_ms=chunk.latency_ms,
            )
        )

    def command(self, command: Command) -> None:
        """One control step of motion, or a hold."""
        kind = self._twist if self._contract.action.command == "twist" else self._trajectory
        self._commands.publish(kind(command))
        if self._gripper is not None and command.gripper_m is not None:
            self._gripper.command(command.gripper_m)

    def _header(self) -> Header:
        return Header(stamp=self._node.get_clock().now().to_msg(), frame_id=self._contract.action.frame_id)

    def _twist(self, command: Command) -> TwistStamped:
        message = TwistStamped(header=self._header())
        for target, value in zip(command.targets, command.motion.tolist(), strict=True):
            part, axis = target.split(".")
            setattr(getattr(message.twist, part), axis, value)
        return message

    def _trajectory(self, command: Command) -> JointTrajectory:
        period = to_duration(self._contract.action.control_period_ns)
        point = JointTrajectoryPoint(positions=command.motion.tolist(), time_from_start=period)
        # No stamp means "now" to a controller; ours would be in its past or future where two clocks differ.
        header = Header(frame_id=self._contract.action.frame_id)
        return JointTrajectory(header=header, joint_names=list(command.targets), points=[point])
