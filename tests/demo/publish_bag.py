"""Publishes a bag's messages with nothing of the product: `publish_bag.py BAG NAMESPACE RATE TOPIC...`.

Stored CDR bytes, reliable, at RATE times the recorded speed; ends when every message has been acknowledged.
"""

import importlib
import sys
import time
from pathlib import Path

import rclpy
from rclpy.duration import Duration
from rclpy.qos import QoSProfile
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore


def main(bag: str, namespace: str, rate: float, topics: list[str]) -> None:
    rclpy.init()
    node = rclpy.create_node("foreign_publisher", namespace=namespace)
    with AnyReader([Path(bag)], default_typestore=get_typestore(Stores.ROS2_JAZZY)) as reader:
        connections = [connection for connection in reader.connections if connection.topic in topics]
        publishers = {}
        for connection in connections:
            package, _, name = connection.msgtype.split("/")
            kind = getattr(importlib.import_module(f"{package}.msg"), name)
            topic = connection.topic.lstrip("/")
            publishers[connection.topic] = node.create_publisher(kind, topic, QoSProfile(depth=10_000))
        while any(publisher.get_subscription_count() == 0 for publisher in publishers.values()):
            rclpy.spin_once(node, timeout_sec=0.05)
        started = time.monotonic()
        for connection, recorded_ns, data in reader.messages(connections=connections):
            # Recorded timing is the point: DDS keeps no order across topics.
            due = started + (recorded_ns - reader.start_time) / 1e9 / rate
            time.sleep(max(0.0, due - time.monotonic()))
            publishers[connection.topic].publish(bytes(data))
        for publisher in publishers.values():
            assert publisher.wait_for_all_acked(Duration(seconds=30))
    node.destroy_node()
    rclpy.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4:])
