"""The input topics' callbacks, with real subscriptions in this process."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.core import ros_messages as msgs
from tests.ros.world import CONTRACT, TIMEOUT_S, fresh_domain
from vla_policy.core.contract import Contract, load_contract
from vla_policy.core.errors import ContractError
from vla_policy.core.server import ServerSettings
from vla_policy.core.status import Latch

import rclpy  # isort: skip  # after the importorskip in tests.ros.world
from builtin_interfaces.msg import Time  # isort: skip
from rclpy.node import Node  # isort: skip
from rclpy.parameter import Parameter  # isort: skip
from rclpy.publisher import Publisher  # isort: skip
from rclpy.qos import QoSProfile  # isort: skip
from sensor_msgs.msg import CompressedImage, JointState  # isort: skip
from std_msgs.msg import Bool, Header  # isort: skip
from vla_policy.nodes import inputs  # isort: skip
from vla_policy.nodes.emergency_stop import EmergencyStop  # isort: skip
from vla_policy.nodes.source_check import Patience, check_sources  # isort: skip

LOADED = load_contract(CONTRACT)
STATE = LOADED.states[0]


@pytest.fixture
def node() -> Iterator[Node]:
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=fresh_domain())
    made = rclpy.create_node("subject", context=context)
    yield made
    made.destroy_node()
    rclpy.shutdown(context=context)


def test_each_publisher_of_a_shared_topic_must_be_there(node: Node) -> None:
    """At configure: the arm's driver alone is not enough, and what the other one sends first is no fault."""
    parts = tuple(replace(STATE, values=values, shared=True) for values in (STATE.values[:3], STATE.values[3:]))
    contract = replace(LOADED, states=parts)
    camera = node.create_publisher(CompressedImage, contract.primary.topic, inputs.qos_of(contract.primary, False, 1))
    joints = [node.create_publisher(JointState, STATE.topic, inputs.qos_of(STATE, False, 1)) for _ in parts]
    header, ending, silent = Header(stamp=Time(sec=1)), threading.Event(), threading.Event()
    image = CompressedImage(header=header, format="png", data=msgs.png(msgs.picture(0)))

    def publish() -> None:
        while not ending.wait(0.01):
            camera.publish(image)
            for publisher, names in zip(joints, (msgs.JOINTS[:3], msgs.JOINTS[3:]), strict=True):
                if publisher is joints[0] or not silent.is_set():
                    values = [0.0] * len(names)
                    publisher.publish(JointState(header=header, name=list(names), position=values, velocity=values))

    driver = threading.Thread(target=publish)
    driver.start()
    try:
        check_sources(node, contract, "message", False, Patience(20.0, ending))
        silent.set()
        with pytest.raises(
            ContractError, match=r"/joint_states \(gripper_width, gripper_velocity\): no message within 0\.5 s"
        ):
            check_sources(node, contract, "message", False, Patience(0.5, ending))
    finally:
        ending.set()
        driver.join()


def test_all_that_is_missing_is_named_at_once(node: Node) -> None:
    def with_cameras(*names: str) -> Contract:
        return replace(LOADED, cameras=tuple(replace(LOADED.primary, name=name, topic=name) for name in names))

    node.create_publisher(CompressedImage, "left", 10)
    words = (
        r"^/joint_states, /middle, /right: no publisher within 0\.3 s; start the driver, .*; "
        r"/left: no message within 0\.3 s, though it has a publisher"
    )
    with pytest.raises(ContractError, match=words):
        check_sources(node, with_cameras("left", "middle", "right"), "message", False, Patience(0.3, threading.Event()))
    context = rclpy.Context()  # a participant has one type for a topic
    rclpy.init(context=context, domain_id=node.context.get_domain_id())
    other = rclpy.create_node("other", context=context)
    for name in ("upper", "lower"):
        other.create_publisher(JointState, name, 10)
    with pytest.raises(ContractError, match=r"^/upper, /lower: published as .*JointState, the contract expects"):
        check_sources(node, with_cameras("upper", "lower"), "graph", False, Patience(20.0, threading.Event()))
    other.destroy_node()
    rclpy.shutdown(context=context)


class Server:
    """Hears what the node would serve."""

    def __init__(self, receive: Callable[[str, Any], None]) -> None:
        self.receive = receive
        self.latches: list[Latch] = []
        self.stopped = threading.Event()

    def lost(self, topic: str, count: int) -> None:
        """Images are best effort here."""

    def stop(self, latch: Latch) -> None:
        self.latches.append(latch)
        self.stopped.set()


def test_a_flood_of_states_cannot_keep_the_images_out(node: Node) -> None:
    """Two more states come while each one is handled: the queue is never empty, and the image is heard all the same."""
    states = node.create_publisher(JointState, STATE.topic, inputs.qos_of(STATE, False, 1))
    camera = node.create_publisher(CompressedImage, LOADED.primary.topic, inputs.qos_of(LOADED.primary, False, 1))
    flooded, seen = threading.Semaphore(0), threading.Event()

    def receive(topic: str, message: Any) -> None:
        if topic == LOADED.primary.topic:
            seen.set()
        elif not seen.is_set():
            flooded.release()
            for _ in range(2):
                states.publish(JointState())

    heard = inputs.Inputs(node, LOADED, ServerSettings(), Server(receive))
    try:
        wait_matched(states, camera)
        states.publish(JointState())
        for _ in range(2 * STATE.qos.depth):
            assert flooded.acquire(timeout=TIMEOUT_S)
        camera.publish(CompressedImage())
        assert seen.wait(TIMEOUT_S), "the image waits as long as states come"
    finally:
        heard.close()


def test_joint_states_of_1000_hz_are_all_heard_in_order(node: Node) -> None:
    """Though an executor takes one message per topic and round: a second of them, beside 30 images."""
    reliable = replace(STATE, qos=replace(STATE.qos, reliability="reliable", depth=1000))
    contract = replace(LOADED, states=(reliable,))
    states = node.create_publisher(JointState, STATE.topic, QoSProfile(depth=1000))
    camera = node.create_publisher(CompressedImage, LOADED.primary.topic, QoSProfile(depth=10))
    heard: list[int] = []
    pause = threading.Event()

    def receive(topic: str, message: Any) -> None:
        if topic == STATE.topic:
            heard.append(message.header.stamp.nanosec)

    subject = inputs.Inputs(node, contract, ServerSettings(), Server(receive))
    try:
        wait_matched(states, camera)
        begun_s = time.monotonic()
        for number in range(1000):
            states.publish(JointState(header=Header(stamp=Time(nanosec=number))))
            if number % 33 == 0:
                camera.publish(CompressedImage(data=bytes(20_000)))
            pause.wait(max(0.0, begun_s + (number + 1) / 1000 - time.monotonic()))
        deadline_s = time.monotonic() + TIMEOUT_S
        while (not heard or heard[-1] != 999) and time.monotonic() < deadline_s:
            pause.wait(0.01)
    finally:
        subject.close()
    assert heard == list(range(1000))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the traceback is for the log
def test_inputs_that_fail_stop_the_robot(node: Node) -> None:
    states = node.create_publisher(JointState, STATE.topic, inputs.qos_of(STATE, False, 1))

    def receive(topic: str, message: Any) -> None:
        raise RuntimeError("a defect")

    server = Server(receive)
    heard = inputs.Inputs(node, LOADED, ServerSettings(), server)
    try:
        wait_matched(states)
        states.publish(JointState())
        assert server.stopped.wait(TIMEOUT_S)
    finally:
        heard.close()
    (latch,) = server.latches
    assert "the inputs failed (RuntimeError('a defect'))" in latch.reason


def test_an_emergency_stop_that_fails_stops_and_hears_on(node: Node) -> None:
    """A stop that raises stands for any defect in that thread: the next message is heard all the same."""
    publisher = node.create_publisher(Bool, "e_stop", 10)
    reasons: list[str] = []
    told = threading.Semaphore(0)

    def stop(reason: str) -> None:
        reasons.append(reason)
        told.release()
        if len(reasons) == 1:
            raise RuntimeError("a defect")

    subject = EmergencyStop(node, stop)  # type: ignore[arg-type]  # it asks the node for names alone
    try:
        wait_matched(publisher)
        publisher.publish(Bool(data=True))
        assert told.acquire(timeout=TIMEOUT_S) and told.acquire(timeout=TIMEOUT_S)
        assert reasons == ["e-stop", "the topic e_stop failed (RuntimeError('a defect')); see the log"]
        publisher.publish(Bool(data=True))
        assert told.acquire(timeout=TIMEOUT_S)
        assert reasons[-1] == "e-stop"
    finally:
        subject.close()


def test_a_parameter_that_is_no_quality_of_service_is_refused() -> None:
    context = rclpy.Context()
    name = f"qos_overrides./{STATE.topic}.subscription.reliability"
    rclpy.init(context=context, domain_id=fresh_domain())
    node = rclpy.create_node("subject", context=context, parameter_overrides=[Parameter(name, value="perhaps")])
    try:
        with pytest.raises(ContractError, match=rf"parameter {name}: 'perhaps' is none of .*reliable, best_effort"):
            check_sources(node, LOADED, "graph", False, Patience(1.0, threading.Event()))
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)


def wait_matched(*publishers: Publisher) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while any(item.get_subscription_count() == 0 for item in publishers):
        assert time.monotonic() < deadline_s, "the subscriptions"
        threading.Event().wait(0.01)
