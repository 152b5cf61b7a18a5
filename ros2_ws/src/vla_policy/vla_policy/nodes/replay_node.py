"""Publishes a bag's contract topics over DDS as they were recorded, and records the decisions that come back.

    ros2 run vla_policy replay_node --ros-args -p bag:=bag -p contract:=contract.yaml -p served:=served -p rate:=1.0

Bytes, quality of service and timing are the recording's; `rate` scales the timing, 0 sends as fast as the policy
answers. `/clock` follows the recording unless `publish_clock` is false, so the policy node should `use_sim_time`.
Starts when every topic has a subscriber. At most `max_in_flight` frames are unanswered at any time, so a policy in
lossless mode answers every frame; the recording's time stands still while the replay waits for answers. The process
ends when all is answered; frames without an answer for `answer_timeout` seconds are given up. `summary` names a JSON
file for the counts, `served` a bag for the decisions.
"""

import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from builtin_interfaces.msg import Time
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rosgraph_msgs.msg import Clock as ClockMessage
from vla_policy_interfaces.msg import ActionChunk

from vla_policy.core.bag import Bag, contract_channels, open_bag, resolve
from vla_policy.core.bag_files import Channel, Message
from vla_policy.core.contract import load_contract
from vla_policy.core.errors import ContractError, DataError
from vla_policy.core.files import write_json
from vla_policy.core.outputs import check_file
from vla_policy.core.recording import BagWriter, offered_qos, recorded_qos
from vla_policy.core.served import ACTION_CHUNK
from vla_policy.nodes.inputs import MESSAGES
from vla_policy.nodes.outputs import CHUNK_TOPIC, to_time
from vla_policy.nodes.process import run_node
from vla_policy.nodes.recording import definition_of

_CLOCK_PERIOD_S = 0.01
_POLL_S = 0.02
_QUEUE = 1000
_SUMMARY = "replay_summary"


@dataclass(frozen=True)
class ReplaySettings:
    """Times in seconds; see the module's text."""

    bag: str
    contract: str
    namespace: str
    rate: float
    publish_clock: bool
    wait_for_subscribers_s: float
    max_in_flight: int
    answer_timeout_s: float
    served: str
    summary: str


DEFAULTS: dict[str, bool | int | float | str] = {
    "bag": "",
    "contract": "",
    "bag_namespace": "",
    "rate": 1.0,
    "publish_clock": True,
    "wait_for_subscribers": 30.0,
    "max_in_flight": 8,
    "answer_timeout": 10.0,
    "served": "",
    "summary": "",
}


def read_settings(node: Node) -> ReplaySettings:
    """Declares and reads the parameters. Raises ContractError for a value that cannot be."""
    value: dict[str, Any] = {name: node.declare_parameter(name, default).value for name, default in DEFAULTS.items()}
    if not value["bag"] or not value["contract"]:
        raise ContractError("replay: set the parameters bag and contract")
    if value["rate"] < 0 or value["max_in_flight"] < 1:
        raise ContractError("replay: rate must not be negative, and max_in_flight at least 1")
    if value["summary"]:
        check_file(value["summary"], _SUMMARY)
    return ReplaySettings(*value.values())


class ReplayNode(Node):
    """Publishes from a thread of its own while the executor receives the decisions."""

    def __init__(self, done: threading.Event) -> None:
        super().__init__("replay_node")
        self.settings = read_settings(self)
        self._error: Exception | None = None
        self._done, self._closing = done, threading.Event()
        self._contract = load_contract(self.settings.contract)
        self._chunk_topic = self.resolve_topic_name(CHUNK_TOPIC)
        self._writer: BagWriter | None = None
        if self.settings.served:
            definitions = {ACTION_CHUNK: definition_of(ACTION_CHUNK)}
            self._writer = BagWriter(self.settings.served, definitions=definitions).__enter__()
            self._writer.add_topic(self._chunk_topic, ACTION_CHUNK, recorded_qos(True, False, 10))
        self._clock_publisher = self.create_publisher(ClockMessage, "/clock", QoSProfile(depth=10))
        self._unanswered: set[int] = set()  # stamps of all frames without an answer, and of those still waited for
        self._outstanding: set[int] = set()
        self._sent = self._answered = 0
        self._answers = threading.Condition()
        self._last_answer_s = time.monotonic()
        self.create_subscription(ActionChunk, CHUNK_TOPIC, self._on_chunk, QoSProfile(depth=_QUEUE), raw=True)
        self._thread = threading.Thread(target=self._run, name="replay", daemon=True)
        self._thread.start()

    def close(self, error: BaseException | None) -> None:
        """Ends publishing and finishes the served bag, of which nothing remains after an error.

        Raises what ended the publishing thread early.
        """
        self._closing.set()
        self._thread.join()
        error = error or self._error
        if self._writer is not None:
            self._writer.__exit__(type(error) if error else None, error, None)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with open_bag(self.settings.bag) as bag:
                channels = contract_channels(bag, self._contract, self.settings.namespace)
                publishers: dict[str, Publisher] = {}
                for channel, topic in channels.items():
                    if channel.topic not in publishers:  # of several publishers the first one's profile counts
                        publishers[channel.topic] = self._publisher(channel, topic)
                self._await_subscribers(publishers)
                self._publish(self._whole(bag, channels), publishers)
            self._await_answers()
            self._summarise()
        except Exception as error:
            self._error = error
        finally:
            self._done.set()

    def _whole(self, bag: Bag, channels: Collection[Channel]) -> Iterator[tuple[Message, Any]]:
        """Messages with what they hold; one that is damaged must not be sent, it would end whoever takes it."""
        for message in bag.messages(channels):
            try:
                yield message, bag.decode(message)
            except DataError as error:
                self.get_logger().warning(f"not sent: {error}")

    def _publisher(self, channel: Channel, topic: str) -> Publisher:
        """With the recorded quality of service, or reliable where none was recorded.

        The depth is no part of the contract between the two ends; a burst must not overwrite what is unacknowledged.
        """
        reliable, kept = offered_qos(channel.qos)
        profile = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=_QUEUE,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if kept else DurabilityPolicy.VOLATILE,
        )
        return self.create_publisher(MESSAGES[self._contract.input_types[topic]], topic, profile)

    def _await_subscribers(self, publishers: dict[str, Publisher]) -> None:
        deadline = time.monotonic() + self.settings.wait_for_subscribers_s
        while missing := [topic for topic, item in publishers.items() if item.get_subscription_count() == 0]:
            if time.monotonic() > deadline:
                raise ContractError(f"replay: no subscriber on {', '.join(missing)}; is the policy node active?")
            if self._closing.wait(_POLL_S):
                return

    def _publish(self, messages: Iterator[tuple[Message, Any]], publishers: dict[str, Publisher]) -> None:
        """Sends everything in recorded order."""
        camera = resolve(self._contract.primary.topic, self.settings.namespace)
        instruction = resolve(self._contract.instruction.topic, self.settings.namespace)
        first_ns, begun_s = -1, time.monotonic()
        for message, content in messages:
            topic = message.channel.topic
            first_ns = message.time_ns if first_ns < 0 else first_ns
            self._await_time(begun_s, first_ns, message.time_ns)
            if topic == camera:
                begun_s += self._await_window(content.header.stamp.sec * 10**9 + content.header.stamp.nanosec)
            if topic == instruction:
                begun_s += self._await_answers()
            if self._closing.is_set():
                return
            publishers[topic].publish(message.data)
            if topic == instruction:
                begun_s += self._await_arrival(publishers[instruction])

    def _await_time(self, begun_s: float, first_ns: int, time_ns: int) -> None:
        """Waits for the message's turn while the clock runs on; `/clock` is never behind what is published."""
        rate = self.settings.rate
        while rate > 0 and not self._closing.is_set():
            elapsed_ns = (time.monotonic() - begun_s) * rate * 1e9
            left_s = (time_ns - first_ns - elapsed_ns) / rate / 1e9
            if left_s <= 0:
                break
            self._tick(first_ns + round(elapsed_ns))
            self._closing.wait(min(left_s, _CLOCK_PERIOD_S))
        self._tick(time_ns)

    def _tick(self, time_ns: int) -> None:
        if self.settings.publish_clock:
            self._clock_publisher.publish(ClockMessage(clock=to_time(time_ns)))

    def _await_window(self, stamp_ns: int) -> float:
        """Back-pressure for one more frame: waits while too many are out. Returns the seconds."""
        waited_s = self._await_answers(self.settings.max_in_flight - 1)
        with self._answers:
            self._outstanding.add(stamp_ns)
            self._unanswered.add(stamp_ns)
            self._sent += 1
        return waited_s

    def _await_answers(self, left_over: int = 0) -> float:
        """Until at most `left_over` frames are out, or none is answered in time: those are given up. In seconds."""
        begun_s = time.monotonic()
        with self._answers:
            self._last_answer_s = begun_s
            while len(self._outstanding) > left_over and not self._closing.is_set():
                left_s = self._last_answer_s + self.settings.answer_timeout_s - time.monotonic()
                if left_s <= 0:
                    self._outstanding.clear()
                    break
                self._answers.wait(min(left_s, _POLL_S * 10))
        return time.monotonic() - begun_s

    def _await_arrival(self, publisher: Publisher) -> float:
        """DDS orders messages within a topic only: an image must not overtake the task it belongs to. In seconds."""
        begun_s = time.monotonic()
        publisher.wait_for_all_acked(Duration(seconds=self.settings.answer_timeout_s))
        return time.monotonic() - begun_s

    def _on_chunk(self, data: bytes) -> None:
        stamp: Time = deserialize_message(data, ActionChunk).observation_stamp
        if self._writer is not None:
            self._writer.write(self._chunk_topic, time.time_ns(), data)
        with self._answers:
            stamp_ns = stamp.sec * 10**9 + stamp.nanosec
            self._outstanding.discard(stamp_ns)
            if stamp_ns in self._unanswered:
                self._unanswered.remove(stamp_ns)
                self._answered += 1
            self._last_answer_s = time.monotonic()
            self._answers.notify_all()

    def _summarise(self) -> None:
        self.get_logger().info(f"{self._sent} frames sent, {self._answered} answered")
        if self.settings.summary:
            content = {"schema_version": 1, "kind": _SUMMARY, "frames": self._sent, "answered": self._answered}
            write_json(self.settings.summary, content | {"settings": asdict(self.settings)})


def main(args: Sequence[str] | None = None) -> int:
    """Runs one replay. Returns 2 when the bag or the policy does not fit, 0 otherwise."""

    def close(node: Node, error: BaseException | None) -> None:
        assert isinstance(node, ReplayNode)
        node.close(error)

    return run_node(ReplayNode, close, args)


if __name__ == "__main__":
    sys.exit(main())
