"""The bond to a lifecycle manager such as Nav2's: topic `bond`, the node's name as its id, while the node is active.

This is the node's end of the protocol of bondcpp and bondpy. Both ends publish that they are active, once per heartbeat
period, and that they are not when they end on purpose. A manager that hears nothing for its timeout, counted from the
second heartbeat on, takes the node for dead and acts. The heartbeats come from the executor that answers services and
sends commands: where that stands still the bond breaks too, as with Nav2's own nodes.
"""

import time
import uuid
from typing import Any

from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import QoSProfile

from vla_policy.core.errors import ContractError

_TIMEOUT_S = 4.0  # as Nav2's nodes tell their managers
_CONNECT_TIMEOUT_S = 10.0
_FAREWELL_S = 0.5
"""For which the end that is meant waits until the manager has received it."""


def status_class() -> Any:
    """The message type of bonds. Raises ContractError where its ROS package is missing."""
    try:
        from bond.msg import Status
    except ModuleNotFoundError as error:
        raise ContractError(
            "parameter bond_heartbeat_period: the ROS package bond is not installed; install it "
            "(apt install ros-$ROS_DISTRO-bond), or set 0.0 here and bond_timeout: 0.0 in the lifecycle manager"
        ) from error
    return Status


class ManagerBond:
    """Held from its making until `close`. A manager that is lost is told of; the loss is the manager's to act on."""

    def __init__(self, owner: Node, period_s: float) -> None:
        """period_s: between heartbeats."""
        self._owner, self._period_s = owner, period_s
        self._status, self._instance = status_class(), str(uuid.uuid4())
        self._manager = ""  # its instance; empty before it is heard
        self._heard_s = time.monotonic()
        self._lost = self._ended = False
        self._publisher = owner.create_publisher(self._status, "bond", QoSProfile(depth=10))
        self._subscription = owner.create_subscription(self._status, "bond", self._hear, QoSProfile(depth=100))
        self._timer = owner.create_timer(period_s, self._beat, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def close(self) -> None:
        """Tells the manager that this end is meant."""
        self._owner.destroy_timer(self._timer)
        self._owner.destroy_subscription(self._subscription)
        self._say(active=False)
        self._publisher.wait_for_all_acked(Duration(seconds=_FAREWELL_S))
        self._owner.destroy_publisher(self._publisher)

    def _say(self, active: bool) -> None:
        message = self._status(id=self._owner.get_name(), instance_id=self._instance, active=active)
        message.header.stamp = self._owner.get_clock().now().to_msg()
        message.heartbeat_period, message.heartbeat_timeout = self._period_s, _TIMEOUT_S
        self._publisher.publish(message)

    def _beat(self) -> None:
        if self._ended:
            return
        self._say(active=True)
        limit_s = _TIMEOUT_S if self._manager else _CONNECT_TIMEOUT_S
        if not self._lost and time.monotonic() - self._heard_s > limit_s:
            self._lost = True
            self._owner.get_logger().warning(f"bond: no lifecycle manager was heard for {limit_s:g} s; motion goes on")

    def _hear(self, message: Any) -> None:
        if message.id != self._owner.get_name() or message.instance_id == self._instance:
            return
        self._heard_s = time.monotonic()
        if not message.active:
            self._say(active=False)  # which the manager's end waits for
            if not self._ended:
                self._owner.get_logger().info("bond: the lifecycle manager has ended it; motion goes on")
            self._ended = True
        elif message.instance_id != self._manager or self._lost:
            self._manager, self._lost, self._ended = message.instance_id, False, False
            self._owner.get_logger().info("bond: held with a lifecycle manager")
