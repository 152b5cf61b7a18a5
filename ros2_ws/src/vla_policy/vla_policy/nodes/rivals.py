"""Who else commands the robot: publishers of this node's command topics, clients of its gripper's action."""

from collections.abc import Iterable, Sequence
from contextlib import suppress

from rclpy.action import get_action_client_names_and_types_by_node
from rclpy.node import Node, NodeNameNonExistentError
from rclpy.publisher import Publisher


def publishers(node: Node, own: Sequence[Publisher]) -> dict[str, str]:
    """The other publishers' nodes of each of these publishers' topics, where there are any, in words by topic.

    A node of the same name elsewhere counts too: of ours there is one publisher per topic.
    """
    found: dict[str, str] = {}
    for publisher in own:
        infos = node.get_publishers_info_by_topic(publisher.topic_name)
        if names := _others(node, ((info.node_name, info.node_namespace) for info in infos)):
            found[publisher.topic_name] = ", ".join(sorted(set(map(_full, names))))
    return found


def action_clients(node: Node, action: str) -> dict[str, str]:
    """Likewise of an action of which `node` is a client. action: its resolved name.

    The feedback's subscriptions are asked for first, as every client has one: one question instead of one per node.
    """
    infos = node.get_subscriptions_info_by_topic(f"{action}/_action/feedback")
    names = _others(node, ((info.node_name, info.node_namespace) for info in infos))
    clients = sorted({_full(name) for name in names if _is_client(node, name, action)})
    return {action: ", ".join(clients)} if clients else {}


def _others(node: Node, names: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without `node` itself, once."""
    found, own = list(names), (node.get_name(), node.get_namespace())
    if own in found:
        found.remove(own)
    return found


def _is_client(node: Node, name: tuple[str, str], action: str) -> bool:
    if not name[1].startswith("/"):  # discovered before its process has told its nodes' names: the next look knows them
        return False
    with suppress(NodeNameNonExistentError):  # gone meanwhile
        return action in (client for client, _ in get_action_client_names_and_types_by_node(node, *name))
    return False


def _full(name: tuple[str, str]) -> str:
    return f"{name[1].rstrip('/')}/{name[0]}"
