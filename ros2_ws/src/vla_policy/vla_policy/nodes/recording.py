"""Topics of a live system into a bag, as they are on the wire."""

from functools import partial
from importlib import import_module
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.topic_endpoint_info import TopicEndpointInfo

from vla_policy.core.errors import ContractError
from vla_policy.core.recording import BagWriter, recorded_qos

_DEPTH = 1000


class TopicRecorder:
    """Subscribes to each topic once it has a publisher, with the quality of service that the publishers offer."""

    def __init__(self, node: Node, writer: BagWriter, topics: list[str]) -> None:
        self._node, self._writer = node, writer
        self._waiting = [node.resolve_topic_name(topic) for topic in topics]
        self.counts = dict.fromkeys(self._waiting, 0)

    @property
    def waiting(self) -> list[str]:
        """Topics without a publisher so far."""
        return list(self._waiting)

    def look(self) -> None:
        """Subscribes to what has appeared; call a few times per second."""
        for topic in self.waiting:
            publishers = self._node.get_publishers_info_by_topic(topic)
            if publishers:
                self._subscribe(topic, publishers)
                self._waiting.remove(topic)

    def _subscribe(self, topic: str, publishers: list[TopicEndpointInfo]) -> None:
        reliable = all(item.qos_profile.reliability == ReliabilityPolicy.RELIABLE for item in publishers)
        kept = all(item.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL for item in publishers)
        kind = publishers[0].topic_type
        self._writer.add_topic(topic, kind, recorded_qos(reliable, kept, 10))
        profile = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=_DEPTH,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if kept else DurabilityPolicy.VOLATILE,
        )
        self._node.create_subscription(message_class(kind), topic, partial(self._write, topic), profile, raw=True)

    def _write(self, topic: str, data: bytes) -> None:
        self._writer.write(topic, self._node.get_clock().now().nanoseconds, data)
        self.counts[topic] += 1


def message_class(kind: str) -> type:
    """The class of a message type such as `package/msg/Name`. Raises ContractError when it is not installed."""
    package, _, name = kind.split("/")
    try:
        return getattr(import_module(f"{package}.msg"), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ContractError(f"message type {kind} is not installed; source its interface package") from error


def definition_of(kind: str) -> str:
    """The `.msg` text of an installed message type."""
    package, folder, name = kind.split("/")
    return (Path(get_package_share_directory(package)) / folder / f"{name}.msg").read_text(encoding="utf-8")
