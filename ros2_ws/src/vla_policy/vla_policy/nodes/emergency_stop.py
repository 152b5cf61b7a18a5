"""The topic `e_stop` (std_msgs/Bool): true latches a stop; only `~/reset` takes it back, whatever the topic says later.

It is heard in a node and a thread of its own, so that neither inference nor image traffic nor a callback of the policy
node delays it. It stops this node's commands. It is no safety circuit: that belongs to the robot's hardware.
"""

import threading
from collections.abc import Callable

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_msgs.msg import Bool

TOPIC = "e_stop"


_PAUSE_S = 0.1
"""Before listening again after a failure, which may come back at once."""


class EmergencyStop:
    """Calls `stop` with the reason for every true on the topic while it exists, from its own thread.

    A failure of hearing is a stop, too, and is listened on after it.
    """

    def __init__(self, owner: LifecycleNode, stop: Callable[[str], None]) -> None:
        self._stop = stop
        self._log = owner.get_logger()
        self._closed = threading.Event()
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
        self._closed.set()
        self._executor.shutdown(timeout_sec=2.0)
        self._thread.join(2.0)
        self._node.destroy_node()

    def _spin(self) -> None:
        while not self._closed.is_set():
            try:
                self._executor.spin()
                return
            except ExternalShutdownException:
                return
            except Exception as error:
                self._log.error(f"topic {TOPIC}: {error!r}; stopped, and listening on")
                self._stop(f"the topic {TOPIC} failed ({error!r}); see the log")
                self._closed.wait(_PAUSE_S)

    def _heard(self, message: Bool) -> None:
        if message.data:
            self._stop("e-stop")
