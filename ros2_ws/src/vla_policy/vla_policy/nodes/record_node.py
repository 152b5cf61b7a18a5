"""Records topics into a bag until SIGINT or SIGTERM.

    ros2 run vla_policy record_node --ros-args -p output:=bag -p contract:=contract.yaml -p topics:="[action_chunk]"

Records the contract's input topics, if one is given, and the named ones. Message times are the node's clock: with
`use_sim_time` the bag runs on the simulation's time.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from vla_policy.core.contract import load_contract
from vla_policy.core.errors import ContractError
from vla_policy.core.recording import STORAGES, BagWriter
from vla_policy.core.served import ACTION_CHUNK
from vla_policy.nodes import declaring
from vla_policy.nodes.declaring import Declared
from vla_policy.nodes.process import run_node
from vla_policy.nodes.recording import TopicRecorder, definition_of

_LOOK_PERIOD_S = 0.1
DECLARED: dict[str, Declared] = {
    "output": Declared("", "folder of the bag, which must not exist yet", fixed=True),
    "storage": Declared("mcap", "format of the bag's files", choices=STORAGES, fixed=True),
    "contract": Declared("", "YAML whose input topics are recorded; empty: only `topics`", fixed=True),
    "topics": Declared([""], "further topics to record", fixed=True),
}


class RecordNode(Node):
    """See the module's text; `start` begins to record."""

    def __init__(self) -> None:
        super().__init__("record_node", automatically_declare_parameters_from_overrides=True)
        declaring.declare(self, DECLARED)
        values = declaring.read(self, DECLARED)
        self._topics = values["topics"]
        if values["contract"]:
            self._topics = [*load_contract(values["contract"]).input_types, *self._topics]
        if not values["output"] or not self._topics:
            raise ContractError("record: set the parameters output and at least one of contract and topics")
        self.output, self.storage = values["output"], values["storage"]

    def start(self, bag: BagWriter) -> TopicRecorder:
        recorder = TopicRecorder(self, bag, self._topics)
        self.create_timer(_LOOK_PERIOD_S, recorder.look, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.get_logger().info(f"recording {len(self._topics)} topics into {self.output}")
        return recorder


@contextmanager
def _open(ending: threading.Event) -> Iterator[RecordNode]:
    """Finishes the bag when it is left; after an error nothing of it remains."""
    node = RecordNode()
    with BagWriter(node.output, node.storage, {ACTION_CHUNK: definition_of(ACTION_CHUNK)}) as bag:
        recorder = node.start(bag)
        try:
            yield node
        finally:
            for topic in recorder.waiting:
                node.get_logger().warning(f"{topic}: never had a publisher; it is not in the bag")
    node.get_logger().info(f"recorded {recorder.counts}")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the recorder."""
    return run_node(_open, args)


if __name__ == "__main__":
    sys.exit(main())
