"""Who else publishes on the topics on which this node commands the robot."""

from collections.abc import Sequence

from rclpy.node import Node
from rclpy.publisher import Publisher


def rivals(node: Node, own: Sequence[Publisher]) -> dict[str, str]:
    """The other publishers' nodes of each of these publishers' topics, where there are any, in words by topic.

    A node of the same name elsewhere counts too: of ours there is one publisher per topic.
    """
    found: dict[str, str] = {}
    for publisher in own:
        infos = node.get_publishers_info_by_topic(publisher.topic_name)
        names = [f"{info.node_namespace.rstrip('/')}/{info.node_name}" for info in infos]
        if node.get_fully_qualified_name() in names:
            names.remove(node.get_fully_qualified_name())
        if names:
            found[publisher.topic_name] = ", ".join(sorted(set(names)))
    return found
