"""The contract's input topics: message classes, quality of service, and the checks at configure."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from rclpy.wait_for_message import wait_for_message
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from vla_policy.core import contract as names
from vla_policy.core.contract import CameraTopic, Contract, InstructionTopic, StateTopic
from vla_policy.core.errors import ContractError, DataError
from vla_policy.core.events import to_event
from vla_policy.core.ros_image import CompressedImage as CompressedBytes
from vla_policy.core.ros_image import RawImage

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


def subscribe(
    node: Node,
    contract: Contract,
    lossless: bool,
    queue_size: int,
    receive: Callable[[str, Any], None],
    lost: Callable[[str, int], None],
) -> list[Subscription]:
    """One subscription per topic; `receive` gets the contract's topic and the message, `lost` what never arrived."""
    made: list[Subscription] = []
    for source in contract.sources:
        subscription = node.create_subscription(
            MESSAGES[source.type],
            source.topic,
            _camera_callback(node, source, receive, lost)
            if isinstance(source, CameraTopic)
            else partial(receive, source.topic),
            qos_of(source, lossless, queue_size),
            qos_overriding_options=QoSOverridingOptions.with_default_policies(),
        )
        if isinstance(source, StateTopic):
            subscription.callback = partial(_receive_all, subscription, source.topic, receive)
        made.append(subscription)
    return made


def _receive_all(subscription: Subscription, topic: str, receive: Callable[[str, Any], None], message: Any) -> None:
    """Takes every state that waits: an executor gives one message per topic and round, and states outnumber images."""
    receive(topic, message)
    while (taken := subscription.handle.take_message(subscription.msg_type, False)) is not None:
        receive(topic, taken[0])


def _camera_callback(
    node: Node, source: CameraTopic, receive: Callable[[str, Any], None], lost: Callable[[str, int], None]
) -> Callable[..., None]:
    # Older rclpy gives no message info; images that the transport loses cannot be counted there.
    if not hasattr(Subscription, "CallbackType"):
        return partial(receive, source.topic)
    gaps = _GapCounter()

    def callback(message: Any, info: dict[str, Any]) -> None:
        missing = gaps.missing(info.get("publication_sequence_number"))
        # Numbers count per publisher, so with several of them a gap says nothing.
        if missing and node.count_publishers(source.topic) == 1:
            lost(source.topic, missing)
        receive(source.topic, message)

    return callback


class _GapCounter:
    """How many numbers are missing between one message and the next; a restarted publisher begins anew."""

    def __init__(self) -> None:
        self._last: int | None = None

    def missing(self, number: int | None) -> int:
        last, self._last = self._last, number
        return 0 if last is None or number is None else max(0, number - last - 1)


def check_sources(node: Node, contract: Contract, check: str, wait_s: float, lossless: bool) -> None:
    """Raises ContractError unless every camera and state topic is there, of its type, and (`message`) usable.

    The instruction may come later: without it the policy holds.
    """
    deadline = time.monotonic() + wait_s
    required: tuple[Source, ...] = (*contract.states, *contract.cameras)
    for source in required:
        if check != "none":
            _check_graph(node, source, deadline, wait_s, lossless)
        if check == "message":
            _check_message(node, contract, source, deadline, wait_s, lossless)


def _check_graph(node: Node, source: Source, deadline: float, wait_s: float, lossless: bool) -> None:
    name = node.resolve_topic_name(source.topic)
    while not (publishers := node.get_publishers_info_by_topic(name)):
        if time.monotonic() >= deadline:
            raise ContractError(
                f"{name}: no publisher within {wait_s:g} s; start the driver, or check namespace and remaps"
            )
        time.sleep(0.02)  # the graph cannot be waited on from inside a transition
    for publisher in publishers:
        if publisher.topic_type != source.type:
            raise ContractError(f"{name}: published as {publisher.topic_type}, the contract expects {source.type}")
        wants_reliable = qos_of(source, lossless, 1).reliability == ReliabilityPolicy.RELIABLE
        if wants_reliable and publisher.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT:
            raise ContractError(
                f"{name}: {publisher.node_name} publishes best effort, reliable is asked for; no message would arrive: "
                "set reliability: best_effort in the contract"
            )


def _check_message(
    node: Node, contract: Contract, source: Source, deadline: float, wait_s: float, lossless: bool
) -> None:
    name = node.resolve_topic_name(source.topic)
    received, message = False, None
    while not received:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise ContractError(f"{name}: no message within {wait_s:g} s, though it has a publisher; check the driver")
        received, message = wait_for_message(
            MESSAGES[source.type],
            node,
            source.topic,
            qos_profile=qos_of(source, lossless, 1),
            time_to_wait=left_s,
        )
    try:
        payload = to_event(contract, source.topic, message, node.get_clock().now().nanoseconds).payload
        if isinstance(payload, RawImage | CompressedBytes):
            payload.decode()
    except DataError as error:
        raise ContractError(f"{name}: {error}") from error
