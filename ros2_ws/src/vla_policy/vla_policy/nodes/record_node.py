"""Records topics into a bag until SIGINT or SIGTERM.

    ros2 run vla_policy record_node --ros-args -p output:=bag -p contract:=contract.yaml -p topics:="[action_chunk]"

Records the contract's input topics, if one is given, and the named ones. Message times are the node's clock: with
`use_sim_time` the bag runs on the simulation's time.
"""

import sys
from collections.abc import Sequence

from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.parameter import Parameter

from vla_policy.core.contract import load_contract
from vla_policy.core.errors import ContractError
from vla_policy.core.recording import BagWriter
from vla_policy.core.served import ACTION_CHUNK
from vla_policy.nodes.process import run_node
from vla_policy.nodes.recording import TopicRecorder, definition_of

_LOOK_PERIOD_S = 0.1


class RecordNode(Node):
    """See the module's text."""

    def __init__(self) -> None:
        super().__init__("record_node")
        output = self.declare_parameter("output", "").value
        storage = self.declare_parameter("storage", "mcap").value
        contract = self.declare_parameter("contract", "").value
        topics = self.declare_parameter("topics", Parameter.Type.STRING_ARRAY).value or []
        if contract:
            topics = [*load_contract(contract).input_types, *topics]
        if not output or not topics:
            raise ContractError("record: set the parameters output and at least one of contract and topics")
        self._bag = BagWriter(output, storage, {ACTION_CHUNK: definition_of(ACTION_CHUNK)})
        self._recorder = TopicRecorder(self, self._bag.__enter__(), topics)
        self.create_timer(_LOOK_PERIOD_S, self._recorder.look, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.get_logger().info(f"recording {len(topics)} topics into {output}")

    def close(self, error: BaseException | None) -> None:
        """Finishes the bag; after an error nothing of it remains."""
        for topic in self._recorder.waiting:
            self.get_logger().warning(f"{topic}: never had a publisher; it is not in the bag")
        self._bag.__exit__(type(error) if error else None, error, None)
        if error is None:
            self.get_logger().info(f"recorded {self._recorder.counts}")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the recorder."""

    def close(node: Node, error: BaseException | None) -> None:
        assert isinstance(node, RecordNode)
        node.close(error)

    return run_node(lambda ending: RecordNode(), close, args)


if __name__ == "__main__":
    sys.exit(main())
