"""What configure demands of the world: every input topic there and usable, somebody who moves the gripper."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from rclpy.node import Node
from rclpy.qos import ReliabilityPolicy
from rclpy.subscription import Subscription

from vla_policy.core.contract import GRIPPER, Contract, StateTopic
from vla_policy.core.errors import ContractError, DataError
from vla_policy.core.events import Event, to_events
from vla_policy.core.ros_image import EncodedImage
from vla_policy.nodes.inputs import Listener, Source, qos_of

_POLL_S = 0.02
_UNTOLD_S = 1.0  # a wait as short as discovery's is not worth a word
# The middleware's word for the owner of an endpoint that it has discovered before the node.
_UNKNOWN_NODE = "_NODE_NAME_UNKNOWN_"


class SourceMissing(ContractError):
    """Something that may come later is not there yet. topics: resolved names of what will have a publisher then."""

    def __init__(self, message: str, topics: Sequence[str]) -> None:
        super().__init__(message)
        self.topics = tuple(topics)


class Patience:
    """Waits in small steps: inside a transition neither the graph nor a message can be waited on.

    tell: is told the topics that are waited for, whenever they change.
    """

    def __init__(
        self, wait_s: float, ending: threading.Event, tell: Callable[[str], None] = lambda topics: None
    ) -> None:
        self.wait_s, self._ending, self._tell = wait_s, ending, tell
        self._begun_s = time.monotonic()

    def until(
        self, ready: Callable[[], bool], refusal: Callable[[], str], missing: Callable[[], Sequence[str]]
    ) -> None:
        """Raises ContractError with the refusal when the time is up, SourceMissing where only topics are `missing`."""
        told = ""
        while not ready():
            waited_s, topics = time.monotonic() - self._begun_s, missing()
            if waited_s >= self.wait_s:
                raise SourceMissing(refusal(), topics) if topics else ContractError(refusal())
            if topics and waited_s > _UNTOLD_S and told != ", ".join(topics):
                told = ", ".join(topics)
                self._tell(told)
            if self._ending.wait(_POLL_S):
                raise ContractError("the process was told to end")


def check_sources(node: Node, contract: Contract, check: str, lossless: bool, patience: Patience) -> None:
    """Raises ContractError unless every camera and state topic is there, of its type, and (`message`) usable.

    It names all that are missing. The instruction may come later: without it the policy holds.
    """
    if check == "none":
        return
    with contextlib.closing(Listener(node)) as listener:
        sources: tuple[Source, ...] = (*contract.states, *contract.cameras)
        subjects = [_Subject(node, contract, source, check, patience.wait_s) for source in sources]
        for subject in subjects:
            subject.attend(listener, lossless)

        def usable() -> bool:
            for _ in subjects:
                listener.executor.spin_once(timeout_sec=0.0)
            for subject in subjects:
                subject.look()
            if final := [subject for subject in subjects if subject.final]:
                raise ContractError(_told(final))
            return not any(subject.complaint for subject in subjects)

        def awaited() -> list[str]:
            waiting = [subject for subject in subjects if subject.complaint]
            return [] if any(subject.heard_wrong for subject in waiting) else [subject.topic for subject in waiting]

        patience.until(usable, lambda: _told([subject for subject in subjects if subject.complaint]), awaited)
    positions = {joint for subject in subjects if subject.event for joint in subject.event.positions or ()}
    missing = [item.target for item in contract.action.dimensions if item.target not in {*positions, GRIPPER}]
    if check == "message" and contract.action.command == "joint_trajectory" and missing:
        raise ContractError(
            f"{contract.path}: position control starts from the measured joints; no joint state names "
            f"{', '.join(missing)}"
        )


def _told(subjects: "Sequence[_Subject]") -> str:
    """Every complaint once, before it the topics that it concerns."""
    names: dict[str, list[str]] = {}
    for subject in subjects:
        names.setdefault(subject.complaint, []).append(subject.name)
    return "; ".join(f"{', '.join(topics)}: {complaint}" for complaint, topics in names.items())


class _Subject:
    """One source. complaint: what is wrong with it, empty when it is usable. final: waiting would not mend it.

    topic: its resolved name. heard_wrong: it is there, but what it says does not fit so far.
    """

    def __init__(self, node: Node, contract: Contract, source: Source, check: str, wait_s: float) -> None:
        self._node, self._contract, self._source, self._wait_s = node, contract, source, wait_s
        self.topic = node.resolve_topic_name(source.topic)
        self.name = self.topic + source.key.removeprefix(source.topic)
        self._wanted = check == "message"
        self._subscription: Subscription | None = None
        self.event: Event | None = None
        self.complaint, self.final = "not looked at yet", False
        self.heard_wrong = False

    def attend(self, listener: Listener, lossless: bool) -> None:
        """Subscribed as it will be, so that quality of service given by parameters counts here too."""
        self._subscription = listener.subscribe(self._source, self._hear, qos_of(self._source, lossless, 1))

    def look(self) -> None:
        """Brings the complaint up to date."""
        if self.final or not self.complaint:
            return
        publishers = self._node.get_publishers_info_by_topic(self.topic)
        if not publishers:
            self.complaint = f"no publisher within {self._wait_s:g} s; start the driver, or check namespace and remaps"
            return
        for publisher in publishers:
            if publisher.topic_type != self._source.type:
                kind = self._source.type
                self.complaint = f"published as {publisher.topic_type}, the contract expects {kind}"
                self.final = True
                return
            if self._wants_reliable and publisher.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT:
                # Its node may become known later than its endpoint.
                self.final = publisher.node_name != _UNKNOWN_NODE
                owner = publisher.node_name if self.final else "a node that discovery does not name"
                self.complaint = (
                    f"{owner} publishes best effort, reliable is asked for; no message would arrive: "
                    "set reliability: best_effort in the contract"
                )
                return
        if self._wanted and self.event is None:
            if not self.heard_wrong:
                self.complaint = f"no message within {self._wait_s:g} s, though it has a publisher; check the driver"
            return
        self.complaint = ""

    @property
    def _wants_reliable(self) -> bool:
        profile = None if self._subscription is None else self._subscription.qos_profile
        return profile is not None and profile.reliability == ReliabilityPolicy.RELIABLE

    def _hear(self, message: Any) -> None:
        now_ns = self._node.get_clock().now().nanoseconds
        try:
            for event in to_events(self._contract, self._source.topic, message, now_ns):
                if isinstance(event.payload, EncodedImage):
                    event.payload.decode()
                if event.source == self._source.key:
                    self.event = event
        except DataError as error:
            # A shared topic's message may be another node's; that with the joints of this source comes in its turn.
            if self.event is None:
                self.complaint, self.heard_wrong = str(error), True
                self.final = self._wanted and not (isinstance(self._source, StateTopic) and self._source.shared)
