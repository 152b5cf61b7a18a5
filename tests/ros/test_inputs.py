"""The input topics' callbacks, with real subscriptions in this process."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.ros.world import CONTRACT, fresh_domain
from vla_policy.core.contract import load_contract

import rclpy  # isort: skip  # after the importorskip in tests.ros.world
from rclpy.node import Node  # isort: skip
from sensor_msgs.msg import JointState  # isort: skip
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
