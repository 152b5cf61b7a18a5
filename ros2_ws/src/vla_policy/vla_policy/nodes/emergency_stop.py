"""The topic `e_stop` (std_msgs/Bool): true latches a stop; only `~/reset` takes it back, whatever the topic says later.

It is heard in a node and a thread of its own, so that neither inference nor image traffic nor a callback of the policy
node delays it. It stops this node's commands. It is no safety circuit: that belongs to the robot's hardware.
"""

import contextlib
import threading
from collections.abc import Callable

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_msgs.msg import Bool

TOPIC = "e_stop"


class EmergencyStop:
    """Calls `stop` for every true on the topic while it exists, from its own thread."""

    def __init__(self, owner: LifecycleNode, stop: Callable[[], None]) -> None:
        self._stop = stop
        # The owner's remaps count here too: this topic may be one for the whole robot.
        self._node = rclpy.create_node(
            f"{owner.get_name()}_e_stop",
            namespace=owner.get_namespace(),
            context=owner.context,
            use_global_arguments=False,
            start_parameter_services=False,
        )
        topic = owner.resolve_topic_name(TOPIC)
        # One that latches its publications reaches a node that starts later; one that does not would be incompatible.
        for durability in (DurabilityPolicy.VOLATILE, DurabilityPolicy.TRANSIENT_LOCAL):
            self._node.create_subscription(Bool, topic, self._heard, QoSProfile(depth=10, durability=durability))
        self._executor = SingleThreadedExecutor(context=owner.context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, name="e_stop", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._executor.shutdown(timeout_sec=2.0)
        self._thread.join(2.0)
        self._node.destroy_node()

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self._executor.spin()

    def _heard(self, message: Bool) -> None:
        if message.data:
            self._stop()
