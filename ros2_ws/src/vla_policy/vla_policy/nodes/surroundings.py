"""What is wrong around a node that serves: others that command the robot, a gripper that nobody moves, no listeners."""

from rclpy.node import Node

from vla_policy.core.contract import GRIPPER_ACTION, Contract
from vla_policy.core.safety import HoldReason
from vla_policy.core.server import PolicyServer
from vla_policy.nodes.outputs import Outputs


class Surroundings:
    """Looked at from time to time while the node is active."""

    def __init__(self, node: Node, contract: Contract, outputs: Outputs, server: PolicyServer) -> None:
        self._node, self._contract, self._outputs, self._server = node, contract, outputs, server
        self._rivals: dict[str, str] = {}

    def look(self) -> None:
        """Reports the faults to the server, and logs who has come or gone."""
        action = self._contract.action
        rivals = self._outputs.rivals()
        faults: dict[str, HoldReason] = {}
        if action.other_publishers != "ignore":
            faults |= {f"{topic} from {names}": HoldReason.OTHER_PUBLISHER for topic, names in rivals.items()}
        if action.gripper is not None and not self._outputs.gripper_ready:
            faults[action.gripper.topic] = HoldReason.NO_GRIPPER
        self._server.report(faults)
        if rivals != self._rivals:
            told = "; ".join(f"{names} on {topic}" for topic, names in rivals.items()) or "nobody any more"
            self._node.get_logger().warning(
                f"others command the robot: {told} (other_publishers: {action.other_publishers})"
            )
            self._rivals = rivals

    @property
    def told(self) -> dict[str, str]:
        """For the diagnostics."""
        return {f"other publishers {topic}": names for topic, names in self._rivals.items()}

    def unheard(self) -> list[str]:
        """Command topics that nobody subscribes to."""
        action = self._contract.action
        topics = [action.topic]
        if action.gripper is not None and action.gripper.type != GRIPPER_ACTION:
            topics.append(action.gripper.topic)
        names = map(self._node.resolve_topic_name, topics)
        return [name for name in names if not self._node.count_subscribers(name)]
