"""The contract's input topics: message classes, quality of service, and the checks at configure."""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from vla_policy.core import contract as names
from vla_policy.core.contract import CameraTopic, Contract, InstructionTopic, StateTopic
from vla_policy.core.errors import ContractError, DataError
from vla_policy.core.events import Event, to_events
from vla_policy.core.ros_image import EncodedImage

MESSAGES: dict[str, type] = {
    names.IMAGE: Image,
    names.COMPRESSED_IMAGE: CompressedImage,
    names.JOINT_STATE: JointState,
    names.POSE_STAMPED: PoseStamped,
    names.STRING: String,
}
Source = CameraTopic | StateTopic | InstructionTopic
_POLL_S = 0.02
# The middleware's word for the owner of an endpoint that it has discovered before the node.
_UNKNOWN_NODE = "_NODE_NAME_UNKNOWN_"


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
    for source in {source.topic: source for source in contract.sources}.values():
        callback: Callable[..., None] = partial(receive, source.topic)
        if isinstance(source, CameraTopic):
            callback = _camera_callback(node, source, receive, lost)
        subscription = _subscription(node, source, callback, qos_of(source, lossless, queue_size))
        if isinstance(source, StateTopic):
            subscription.callback = partial(_receive_all, subscription, source.topic, receive)
        made.append(subscription)
    return made


def _subscription(node: Node, source: Source, callback: Callable[..., None], profile: QoSProfile) -> Subscription:
    return node.create_subscription(
        MESSAGES[source.type],
        source.topic,
        callback,
        profile,
        qos_overriding_options=QoSOverridingOptions.with_default_policies(),
    )


def _receive_all(subscription: Subscription, topic: str, receive: Callable[[str, Any], None], message: Any) -> None:
    """Takes every state that waits: an executor gives one message per topic and round, and states outnumber images.

    At most a queue's length, so that a flood of states cannot keep the images out.
    """
    receive(topic, message)
    for _ in range(subscription.qos_profile.depth):
        taken = subscription.handle.take_message(subscription.msg_type, False)
        if taken is None:
            return
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
        if missing and node.count_publishers(node.resolve_topic_name(source.topic)) == 1:
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


def check_sources(
    node: Node, contract: Contract, check: str, wait_s: float, lossless: bool, ending: threading.Event
) -> None:
    """Raises ContractError unless every camera and state topic is there, of its type, and (`message`) usable.

    The instruction may come later: without it the policy holds. Gives up as soon as `ending` is set.
    """
    if check == "none":
        return
    patience = _Patience(wait_s, ending)
    required: tuple[Source, ...] = (*contract.states, *contract.cameras)
    positions: set[str] = set()
    for source in required:
        # Subscribed as it will be, so that quality of service given by parameters counts here too.
        subscription = _subscription(node, source, lambda message: None, qos_of(source, lossless, 1))
        try:
            _check_graph(node, source, subscription, patience)
            if check == "message":
                event = _check_message(node, contract, source, subscription, patience)
                positions |= set(event.positions or ())
        finally:
            node.destroy_subscription(subscription)
    missing = [item.target for item in contract.action.dimensions if item.target not in {*positions, names.GRIPPER}]
    if check == "message" and contract.action.command == "joint_trajectory" and missing:
        raise ContractError(
            f"{contract.path}: position control starts from the measured joints; no joint state names "
            f"{', '.join(missing)}"
        )


class _Patience:
    """Waits in small steps: inside a transition neither the graph nor a message can be waited on."""

    def __init__(self, wait_s: float, ending: threading.Event) -> None:
        self.wait_s, self._ending = wait_s, ending
        self._deadline_s = time.monotonic() + wait_s

    def wait(self, refusal: str) -> None:
        """A moment's rest. Raises ContractError with `refusal` when the time is up."""
        if time.monotonic() >= self._deadline_s:
            raise ContractError(refusal)
        if self._ending.wait(_POLL_S):
            raise ContractError("the process was told to end")


def _check_graph(node: Node, source: Source, subscription: Subscription, patience: _Patience) -> None:
    name = node.resolve_topic_name(source.topic)
    while not (publishers := node.get_publishers_info_by_topic(name)):
        patience.wait(
            f"{name}: no publisher within {patience.wait_s:g} s; start the driver, or check namespace and remaps"
        )
    for publisher in publishers:
        if publisher.topic_type != source.type:
            raise ContractError(f"{name}: published as {publisher.topic_type}, the contract expects {source.type}")
        wants_reliable = subscription.qos_profile.reliability == ReliabilityPolicy.RELIABLE
        if wants_reliable and publisher.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT:
            _refuse_best_effort(node, name, publisher, patience)


def _refuse_best_effort(node: Node, name: str, publisher: TopicEndpointInfo, patience: _Patience) -> NoReturn:
    """Raises ContractError naming the publisher's node, which may become known later than its endpoint."""
    refusal = (
        f"{name}: {{}} publishes best effort, reliable is asked for; no message would arrive: "
        "set reliability: best_effort in the contract"
    )
    owner = publisher.node_name
    while owner == _UNKNOWN_NODE:
        patience.wait(refusal.format("a node that discovery does not name"))
        known = node.get_publishers_info_by_topic(name)
        owner = next((item.node_name for item in known if item.endpoint_gid == publisher.endpoint_gid), owner)
    raise ContractError(refusal.format(owner))


def _check_message(
    node: Node, contract: Contract, source: Source, subscription: Subscription, patience: _Patience
) -> Event:
    name = node.resolve_topic_name(source.topic) + source.key.removeprefix(source.topic)
    refusal = f"{name}: no message within {patience.wait_s:g} s, though it has a publisher; check the driver"
    while True:
        while (taken := subscription.handle.take_message(subscription.msg_type, False)) is None:
            patience.wait(refusal)
        try:
            for event in to_events(contract, source.topic, taken[0], node.get_clock().now().nanoseconds):
                if isinstance(event.payload, EncodedImage):
                    event.payload.decode()
                if event.source == source.key:
                    return event
        except DataError as error:
            refusal = f"{name}: {error}"
            if not isinstance(source, StateTopic) or not source.shared:
                raise ContractError(refusal) from error
        # A shared topic's message may be another node's; that with the joints of `source` comes in its turn.
