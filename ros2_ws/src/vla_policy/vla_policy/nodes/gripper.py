"""The gripper's commands: a message for each control step, or a goal of an action whenever the choice changes."""

import threading
import time
from typing import Any, Protocol

from rclpy.action import ActionClient
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile
from rclpy.task import Future
from std_msgs.msg import Float64MultiArray

from vla_policy.core.contract import FLOATS, GripperCommand
from vla_policy.core.errors import ContractError

_RETRY_S = 1.0


class Gripper(Protocol):
    """Sends openings, in metres."""

    @property
    def ready(self) -> bool:
        """Whether somebody can be reached who moves the fingers."""

    def command(self, opening_m: float) -> None: ...

    def destroy(self) -> None: ...


def make_gripper(node: LifecycleNode, contract: GripperCommand) -> Gripper:
    """Raises ContractError where the action's type is not installed."""
    return GripperTopic(node, contract) if contract.type == FLOATS else GripperAction(node, contract)


class GripperTopic:
    """A lifecycle publisher of std_msgs/Float64MultiArray with the opening as its only value."""

    ready = True

    def __init__(self, node: LifecycleNode, contract: GripperCommand) -> None:
        self._node = node
        self.publisher = node.create_lifecycle_publisher(Float64MultiArray, contract.topic, QoSProfile(depth=1))

    def command(self, opening_m: float) -> None:
        self.publisher.publish(Float64MultiArray(data=[opening_m]))

    def destroy(self) -> None:
        self._node.destroy_lifecycle_publisher(self.publisher)


class GripperAction:
    """A client of control_msgs/action/GripperCommand.

    A goal goes out when the opening differs from the last one that was accepted for, again where the server refused it
    or was restarted, at most once per second.
    """

    def __init__(self, node: LifecycleNode, contract: GripperCommand) -> None:
        self._node, self._contract = node, contract
        self._type = _action_type()
        self.name = node.resolve_topic_name(contract.topic)
        self._client = ActionClient(node, self._type, contract.topic)
        self._lock = threading.Lock()
        self._sent_m: float | None = None
        self._not_before_s = 0.0

    @property
    def ready(self) -> bool:
        there: bool = self._client.server_is_ready()
        if not there:
            self._sent_m = None  # its successor knows nothing of what was asked for
        return there

    def command(self, opening_m: float) -> None:
        with self._lock:
            if opening_m == self._sent_m or time.monotonic() < self._not_before_s or not self.ready:
                return
            self._sent_m = opening_m
        goal = self._type.Goal()
        goal.command.position, goal.command.max_effort = opening_m, self._contract.max_effort_n
        self._client.send_goal_async(goal).add_done_callback(self._answered)

    def destroy(self) -> None:
        self._client.destroy()

    def _answered(self, future: Future) -> None:
        handle = future.result()
        if handle is not None and handle.accepted:
            return
        with self._lock:
            self._sent_m, self._not_before_s = None, time.monotonic() + _RETRY_S
        self._node.get_logger().error(f"{self._contract.topic}: the gripper refused a goal; it is sent again")


def _action_type() -> Any:
    try:
        from control_msgs.action import GripperCommand as Action
    except ModuleNotFoundError as error:
        raise ContractError(
            "control_msgs is not installed, whose action GripperCommand the contract's gripper asks for; "
            "install it: sudo apt install ros-$ROS_DISTRO-control-msgs"
        ) from error
    return Action
