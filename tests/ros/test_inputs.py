"""The input topics' callbacks, with real subscriptions in this process."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.core import ros_messages as msgs
from tests.ros.world import CONTRACT, fresh_domain
from vla_policy.core.contract import load_contract
from vla_policy.core.errors import ContractError

import rclpy  # isort: skip  # after the importorskip in tests.ros.world
from builtin_interfaces.msg import Time  # isort: skip
from rclpy.node import Node  # isort: skip
from sensor_msgs.msg import CompressedImage, JointState  # isort: skip
from std_msgs.msg import Header  # isort: skip
from vla_policy.nodes import inputs  # isort: skip

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
        inputs.check_sources(node, contract, "message", 20.0, False, ending)
        silent.set()
        with pytest.raises(
            ContractError, match=r"/joint_states \(gripper_width, gripper_velocity\): no message within 0\.5 s"
        ):
            inputs.check_sources(node, contract, "message", 0.5, False, ending)
    finally:
        ending.set()
        driver.join()


def test_a_flood_of_states_cannot_keep_the_images_out(node: Node) -> None:
    """Another state arrives while each one is handled: the callback still returns, after a queue's length."""
    publisher = node.create_publisher(JointState, STATE.topic, inputs.qos_of(STATE, False, 1))
    handled: list[str] = []

    def receive(topic: str, message: Any) -> None:
        handled.append(topic)
        assert len(handled) < 1000, "the callback goes on as long as the flood"
        publisher.publish(JointState())

    subscriptions = inputs.subscribe(node, LOADED, False, 1, receive, lambda topic, count: None)
    (states,) = (item for item in subscriptions if item.msg_type is JointState)
    states.callback(JointState())
    assert handled == [STATE.topic] * (1 + STATE.qos.depth)
