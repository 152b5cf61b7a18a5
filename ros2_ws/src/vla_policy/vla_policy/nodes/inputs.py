"""The contract's input topics: message classes, quality of service, and who hears them.

They are heard in a node and a thread of their own. An executor takes one message per topic and round; beside the
services and timers of the policy node a round takes so long that joint states of 1000 Hz would pile up, and the control
step would wait for images.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import rclpy
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from vla_policy.core import contract as names
from vla_policy.core.contract import CameraTopic, Contract, InstructionTopic, StateTopic
from vla_policy.core.errors import ContractError
from vla_policy.core.server import PolicyServer, ServerSettings
from vla_policy.core.status import Latch

MESSAGES: dict[str, type] = {
    names.IMAGE: Image,
    names.COMPRESSED_IMAGE: CompressedImage,
    names.JOINT_STATE: JointState,
    names.POSE_STAMPED: PoseStamped,
    names.STRING: String,
}
Source = CameraTopic | StateTopic | InstructionTopic


def qos_of(source: Source, lossless: bool, queue_size: int) -> QoSProfile:
    """The profile that the contract asks for; lossless mode needs reliable delivery and room for the queue."""
    reliable = lossless or source.qos.reliability == "reliable"
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=max(source.qos.depth, queue_size) if lossless else source.qos.depth,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy[source.qos.durability.upper()],
    )


def _overridden(owner: Node, topic: str, profile: QoSProfile) -> QoSProfile:
    """`profile` with what the owner's parameters `qos_overrides.TOPIC.subscription.*` change, as ROS names them.

    Raises ContractError for a word that is no policy.
    """

    def given(policy: str, default: Any) -> Any:
        name = f"qos_overrides.{topic}.subscription.{policy}"
        if not owner.has_parameter(name):
            owner.declare_parameter(name, default, ParameterDescriptor(description=policy, read_only=True))
        return owner.get_parameter(name).value

    def word(policy: str, kind: Any, default: Any) -> Any:
        value = given(policy, default.name.lower())
        if value.upper() not in kind.__members__:
            known = ", ".join(name.lower() for name in kind.__members__)
            raise ContractError(f"parameter qos_overrides.{topic}.subscription.{policy}: {value!r} is none of {known}")
        return kind[value.upper()]

    return QoSProfile(
        history=word("history", HistoryPolicy, profile.history),
        depth=given("depth", profile.depth),
        reliability=word("reliability", ReliabilityPolicy, profile.reliability),
        durability=profile.durability,
    )


class Listener:
    """A node beside the owner's, with subscriptions to the owner's topics and an executor of its own."""

    def __init__(self, owner: Node) -> None:
        self._owner = owner
        self.node = rclpy.create_node(
            f"{owner.get_name()}_inputs",
            namespace=owner.get_namespace(),
            context=owner.context,
            use_global_arguments=False,
            start_parameter_services=False,
        )
        self.executor = SingleThreadedExecutor(context=owner.context)
        self.executor.add_node(self.node)

    def subscribe(self, source: Source, callback: Callable[..., None], profile: QoSProfile) -> Subscription:
        """By the owner's remaps and parameters."""
        topic = self._owner.resolve_topic_name(source.topic)
        profile = _overridden(self._owner, topic, profile)
        return self.node.create_subscription(MESSAGES[source.type], topic, callback, profile)

    def close(self, thread: threading.Thread | None = None) -> None:
        """thread: that spins the executor."""
        self.executor.shutdown(timeout_sec=2.0)
        if thread is not None:
            thread.join(2.0)
        self.node.destroy_node()


class Inputs:
    """One subscription per topic until `close`; the server gets every message, and how many images never arrived."""

    def __init__(self, owner: Node, contract: Contract, settings: ServerSettings, server: PolicyServer) -> None:
        self._listener, self._server = Listener(owner), server
        for source in {source.topic: source for source in contract.sources}.values():
            callback: Callable[..., None] = partial(server.receive, source.topic)
            if isinstance(source, CameraTopic):
                callback = _camera_callback(owner, source, server)
            self._listener.subscribe(source, callback, qos_of(source, settings.lossless, settings.queue_size))
        self._thread = threading.Thread(target=self._spin, name="inputs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """After it no further message is received."""
        self._listener.close(self._thread)

    def _spin(self) -> None:
        try:
            self._listener.executor.spin()
        except ExternalShutdownException:
            pass
        except BaseException as error:
            # Nothing is heard any more; the traceback goes to stderr.
            self._server.stop(Latch(f"the inputs failed ({error!r}); see the log"))
            raise


def _camera_callback(owner: Node, source: CameraTopic, server: PolicyServer) -> Callable[..., None]:
    # Older rclpy gives no message info; images that the transport loses cannot be counted there.
    if not hasattr(Subscription, "CallbackType"):
        return partial(server.receive, source.topic)
    gaps = _GapCounter()

    def callback(message: Any, info: dict[str, Any]) -> None:
        missing = gaps.missing(info.get("publication_sequence_number"))
        # Numbers count per publisher, so with several of them a gap says nothing.
        if missing and owner.count_publishers(owner.resolve_topic_name(source.topic)) == 1:
            server.lost(source.topic, missing)
        server.receive(source.topic, message)

    return callback


class _GapCounter:
    """How many numbers are missing between one message and the next; a restarted publisher begins anew."""

    def __init__(self) -> None:
        self._last: int | None = None

    def missing(self, number: int | None) -> int:
        last, self._last = self._last, number
        return 0 if last is None or number is None else max(0, number - last - 1)
