"""Publishes a bag's contract topics over DDS as they were recorded, and records the decisions that come back.

    ros2 run vla_policy replay_node --ros-args -p bag:=bag -p contract:=contract.yaml -p served:=served -p rate:=1.0

Bytes, quality of service and timing are the recording's; `rate` scales the timing, 0 sends as fast as the policy
answers. `/clock` follows the recording unless `publish_clock` is false, so the policy node should `use_sim_time`.
Starts when every topic has a subscriber. At most `max_in_flight` frames are unanswered at any time, so a policy in
lossless mode answers every frame; the recording's time stands still while the replay waits for answers. It does not
wait for frames that nobody can answer (no task yet, no state near enough, an image that is none): it knows them by the
code that the policy node runs. The process ends when all is answered; frames without an answer for `answer_timeout`
seconds are given up, and none is waited for until an answer comes again. `summary` names a JSON file for the counts,
`served` a bag for the decisions.
"""

import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rosgraph_msgs.msg import Clock as ClockMessage
from std_msgs.msg import String
from vla_policy_interfaces.msg import ActionChunk

from vla_policy.core.bag import Bag, contract_channels, open_bag
from vla_policy.core.bag_files import Channel, Message
from vla_policy.core.contract import load_contract
from vla_policy.core.errors import ContractError, DataError
from vla_policy.core.events import Event, nanoseconds, to_events
from vla_policy.core.files import write_json
from vla_policy.core.observe import observe
from vla_policy.core.outputs import check_file
from vla_policy.core.recording import BagWriter, offered_qos, recorded_qos
from vla_policy.core.served import ACTION_CHUNK
from vla_policy.core.server import LOSSLESS_WAIT_NS
from vla_policy.core.synchroniser import Dropped, DropReason, Frame, Synchroniser
from vla_policy.nodes import declaring
from vla_policy.nodes.declaring import Declared
from vla_policy.nodes.inputs import MESSAGES
from vla_policy.nodes.outputs import CHUNK_TOPIC, to_time
from vla_policy.nodes.process import run_node
from vla_policy.nodes.recording import definition_of
from vla_policy.nodes.unanswered import Unanswered

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
    instruction: str
    rate: float
    publish_clock: bool
    wait_for_subscribers_s: float
    max_in_flight: int
    answer_timeout_s: float
    served: str
    summary: str


DECLARED: dict[str, Declared] = {
    "bag": Declared("", "rosbag2 folder, .mcap or .db3 file", fixed=True),
    "contract": Declared("", "YAML that maps topics to the policy's inputs", fixed=True),
    "bag_namespace": Declared("", "namespace of the contract's topics in the bag", fixed=True),
    "instruction": Declared("", "task in words before the first one that the bag tells", fixed=True),
    "rate": Declared(1.0, "times recorded speed; 0: as fast as it is answered", (0.0, 1000.0), fixed=True),
    "publish_clock": Declared(True, "publish /clock from the recording", fixed=True),
    "wait_for_subscribers": Declared(
        30.0, "seconds to wait for a subscriber on every topic", (0.0, 3600.0), fixed=True
    ),
    "max_in_flight": Declared(8, "frames that may be unanswered at any time", (1, 1000), fixed=True),
    "answer_timeout": Declared(
        10.0, "seconds without an answer after which frames are given up", (0.01, 3600.0), fixed=True
    ),
    "served": Declared("", "bag to write the decisions to; empty: none", fixed=True),
    "summary": Declared("", "JSON file for the counts; empty: none", fixed=True),
}


def read_settings(node: Node) -> ReplaySettings:
    """Declares and reads the parameters. Raises ContractError for a value that cannot be."""
    declaring.declare(node, DECLARED)
    value = declaring.read(node, DECLARED)
    if not value["bag"] or not value["contract"]:
        raise ContractError("replay: set the parameters bag and contract")
    if value["summary"]:
        check_file(value["summary"], _SUMMARY)
    return ReplaySettings(
        bag=value["bag"],
        contract=value["contract"],
        namespace=value["bag_namespace"],
        instruction=value["instruction"],
        rate=value["rate"],
        publish_clock=value["publish_clock"],
        wait_for_subscribers_s=value["wait_for_subscribers"],
        max_in_flight=value["max_in_flight"],
        answer_timeout_s=value["answer_timeout"],
        served=value["served"],
        summary=value["summary"],
    )


class ReplayNode(Node):
    """Publishes from a thread of its own, from `start` on, while the executor receives the decisions."""

    def __init__(self, done: threading.Event) -> None:
        super().__init__("replay_node", automatically_declare_parameters_from_overrides=True)
        self.settings = read_settings(self)
        self._error: Exception | None = None
        self._done, self._closing = done, threading.Event()
        self._contract = load_contract(self.settings.contract)
        self._chunk_topic = self.resolve_topic_name(CHUNK_TOPIC)
        self._writer: BagWriter | None = None
        self._clock_publisher = self.create_publisher(ClockMessage, "/clock", QoSProfile(depth=10))
        self._hearing = threading.Condition()
        self._counts: list[int] = []  # images that the policy node says it has heard, one diagnostics after the other
        self._frames = Unanswered(self.settings.answer_timeout_s, self._closing)
        self._synchroniser = Synchroniser(self._contract, LOSSLESS_WAIT_NS, self.settings.instruction)
        self._thread = threading.Thread(target=self._run, name="replay", daemon=True)

    def start(self, writer: BagWriter | None) -> None:
        """writer: of the bag for the decisions."""
        self._writer = writer
        if writer is not None:
            writer.add_topic(self._chunk_topic, ACTION_CHUNK, recorded_qos(True, False, 10))
        self.create_subscription(ActionChunk, CHUNK_TOPIC, self._on_chunk, QoSProfile(depth=_QUEUE), raw=True)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, QoSProfile(depth=10))
        self._thread.start()

    def close(self) -> None:
        """Ends publishing. Raises what ended the publishing thread early."""
        self._closing.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with open_bag(self.settings.bag) as bag:
                channels = contract_channels(bag, self._contract, self.settings.namespace, self.settings.instruction)
                publishers: dict[str, Publisher] = {}
                for channel, topic in channels.items():
                    if topic not in publishers:  # of several publishers the first one's profile counts
                        publishers[topic] = self._publisher(topic, *offered_qos(channel.qos))
                instruction = self._contract.instruction.topic
                if instruction not in publishers:
                    publishers[instruction] = self._publisher(instruction, reliable=True, kept=True)
                self._await_subscribers(publishers)
                self._publish(bag, channels, publishers)
            self._frames.wait()
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

    def _publisher(self, topic: str, reliable: bool, kept: bool) -> Publisher:
        """With the recorded quality of service, or reliable where none was recorded.

        The depth is no part of the contract between the two ends; a burst must not overwrite what is unacknowledged.
        """
        profile = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=_QUEUE,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if kept else DurabilityPolicy.VOLATILE,
        )
        return self.create_publisher(MESSAGES[self._contract.input_types[topic]], topic, profile)

    def _await_subscribers(self, publishers: dict[str, Publisher]) -> None:
        deadline = time.monotonic() + self.settings.wait_for_subscribers_s
        while missing := [item.topic for item in publishers.values() if item.get_subscription_count() == 0]:
            if time.monotonic() > deadline:
                raise ContractError(f"replay: no subscriber on {', '.join(missing)}; is the policy node active?")
            if self._closing.wait(_POLL_S):
                return

    def _publish(self, bag: Bag, channels: Mapping[Channel, str], publishers: Mapping[str, Publisher]) -> None:
        """Sends everything in recorded order. publishers: by the topic's name in the contract."""
        camera, instruction = self._contract.primary.topic, self._contract.instruction.topic
        if self.settings.instruction:
            publishers[instruction].publish(String(data=self.settings.instruction))
            self._await_arrival(publishers[instruction])
        first_ns, last_ns, begun_s = -1, 0, time.monotonic()
        for message, content in self._whole(bag, channels):
            topic, last_ns = channels[message.channel], message.time_ns
            first_ns = last_ns if first_ns < 0 else first_ns
            self._await_time(begun_s, first_ns, last_ns)
            if topic == camera:
                begun_s += self._frames.wait(self.settings.max_in_flight - 1)
                self._frames.send(nanoseconds(content.header.stamp))
            if topic == instruction:
                begun_s += self._frames.wait() + self._await_heard()
            if self._closing.is_set():
                return
            publishers[topic].publish(message.data)
            if topic == instruction:
                begun_s += self._await_arrival(publishers[instruction])
            self._foresee(topic, content, last_ns)
        self._expect(self._synchroniser.flush())
        self._tick(last_ns + 2 * LOSSLESS_WAIT_NS)  # those whose state never came are decided without it

    def _foresee(self, topic: str, content: Any, time_ns: int) -> None:
        """Finds the frames that are complete and can be answered, by the policy node's own code."""
        events: list[Event] | list[Dropped]
        try:
            events = to_events(self._contract, topic, content, time_ns)
        except DataError as error:
            events = [Dropped(topic, time_ns, DropReason.INVALID_MESSAGE, str(error))]
        for event in events:
            self._expect(self._synchroniser.offer(event))

    def _expect(self, results: list[Frame | Dropped]) -> None:
        for result in results:
            if isinstance(result, Frame):
                with suppress(DataError):  # an image that is none
                    observe(result, self._contract)
                    self._frames.expect(result.stamp_ns)

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

    def _await_arrival(self, publisher: Publisher) -> float:
        """DDS orders messages within a topic only: an image must not overtake the task it belongs to. In seconds."""
        begun_s = time.monotonic()
        publisher.wait_for_all_acked(Duration(seconds=self.settings.answer_timeout_s))
        return time.monotonic() - begun_s

    def _await_heard(self) -> float:
        """A task must not overtake an image before it that nobody answers. In seconds.

        The node's diagnostics say when it hears no more of them: twice the same count after the last one went out.
        """
        begun_s = time.monotonic()
        if self._frames.heard:
            return 0.0
        with self._hearing:
            self._counts.clear()
            deadline_s = begun_s + self.settings.answer_timeout_s
            while len(self._counts) < 2 or self._counts[-1] != self._counts[-2]:
                if self._closing.is_set() or time.monotonic() > deadline_s:
                    break
                self._hearing.wait(_POLL_S)
        return time.monotonic() - begun_s

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        key = f"received {self._contract.primary.topic}"
        with self._hearing:
            self._counts += [int(item.value) for status in message.status for item in status.values if item.key == key]

    def _on_chunk(self, data: bytes) -> None:
        chunk: ActionChunk = deserialize_message(data, ActionChunk)
        if self._writer is not None:
            self._writer.write(self._chunk_topic, time.time_ns(), data)
        self._frames.answer(nanoseconds(chunk.observation_stamp))

    def _summarise(self) -> None:
        frames = self._frames
        self.get_logger().info(f"{frames.sent} frames sent, {frames.answered} answered")
        if self.settings.summary:
            content = {"schema_version": 1, "kind": _SUMMARY, "frames": frames.sent, "answered": frames.answered}
            write_json(self.settings.summary, content | {"settings": asdict(self.settings)})


@contextmanager
def _open(done: threading.Event) -> Iterator[ReplayNode]:
    """Finishes the served bag when it is left; after an error nothing of it remains."""
    node = ReplayNode(done)
    definitions = {ACTION_CHUNK: definition_of(ACTION_CHUNK)}
    served = node.settings.served
    with BagWriter(served, definitions=definitions) if served else nullcontext() as writer:
        node.start(writer)
        try:
            yield node
        finally:
            node.close()


def main(args: Sequence[str] | None = None) -> int:
    """Runs one replay. Returns 2 when the bag or the policy does not fit, 0 otherwise."""
    return run_node(_open, args)


if __name__ == "__main__":
    sys.exit(main())
