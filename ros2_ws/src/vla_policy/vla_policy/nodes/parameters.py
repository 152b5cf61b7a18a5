"""The policy node's parameters: declared once, with ranges and descriptions, and read into types."""

from dataclasses import dataclass

from rclpy.node import Node

from vla_policy.core.chunks import BLENDING
from vla_policy.core.errors import ContractError
from vla_policy.core.server import ServerSettings
from vla_policy.nodes import declaring
from vla_policy.nodes.declaring import Declared

CHECKS = ("none", "graph", "message")


@dataclass(frozen=True)
class NodeParameters:
    """Times in seconds. See `DECLARED` for the meaning of each."""

    engine_path: str
    unnorm_key: str
    engine_threads: int
    contract: str
    instruction: str
    autostart: bool
    enabled: bool
    check_sources: str
    source_wait_s: float
    output_watchdog_timeout_s: float
    bond_heartbeat_period_s: float
    server: ServerSettings


DECLARED: dict[str, Declared] = {
    "engine_path": Declared("", "folder of the engine that serves"),
    "unnorm_key": Declared("", "which of the policy's statistics to use; empty: the only ones"),
    "engine_threads": Declared(0, "CPU threads of the engine; 0: as many as its backend likes", (0, 1024)),
    "contract": Declared("", "YAML file that maps topics to the policy's inputs and actions to commands"),
    "instruction": Declared("", "task in words at activation; empty: wait for the topic or the service"),
    "autostart": Declared(False, "configure and activate without a lifecycle manager", fixed=True),
    "enabled": Declared(False, "allow motion from activation on; false is the dry run"),
    "lossless": Declared(False, "answer every frame in order instead of the newest (replay)"),
    "queue_size": Declared(256, "frames that may wait in lossless mode", (1, 100_000)),
    "source_timeout": Declared(0.5, "seconds after which camera or state is stale and the robot is held", (0.01, 60.0)),
    "future_tolerance": Declared(0.05, "seconds by which a stamp may lie ahead of this node's clock", (0.0, 10.0)),
    "disarm_after": Declared(5.0, "seconds of a fault after which motion needs a new start; 0: never", (0.0, 3600.0)),
    "inference_deadline": Declared(
        0.5, "seconds from image stamp to decision; a later decision never moves", (0.001, 60.0)
    ),
    "freeze_timeout": Declared(1.0, "seconds of an unchanging image that mean a frozen camera; 0: off", (0.0, 600.0)),
    "chunk_grace": Declared(0.1, "seconds for which a chunk's last action is held beyond its end", (0.0, 10.0)),
    "blending": Declared("latest", "how chunks follow each other", choices=BLENDING),
    "ensemble_decay": Declared(0.1, "m in temporal ensembling's weights exp(-m i)", (0.0, 10.0)),
    "check_sources": Declared("message", "what configure demands of the input topics", choices=CHECKS),
    "source_wait": Declared(10.0, "seconds that configure waits for the input topics", (0.0, 600.0)),
    "output_watchdog_timeout": Declared(
        0.25, "seconds without a control step after which the hold is sent", (0.01, 60.0)
    ),
    "bond_heartbeat_period": Declared(
        0.0, "seconds between heartbeats to a lifecycle manager's bond; 0: no bond", (0.0, 4.0)
    ),
    "diagnostic_updater.period": Declared(1.0, "seconds between diagnostics", (0.05, 60.0)),
}


def declare(node: Node) -> None:
    """Declares every parameter. Those that are not fixed may be set until the node is configured."""
    declaring.declare(node, DECLARED)


def read(node: Node) -> NodeParameters:
    """The current values. Raises ContractError for a choice that does not exist or a path that is missing."""
    value = declaring.read(node, DECLARED)
    for name in ("engine_path", "contract"):
        if not value[name]:
            raise ContractError(f"parameter {name} is not set; start the node with -p {name}:=PATH")
    return NodeParameters(
        engine_path=value["engine_path"],
        unnorm_key=value["unnorm_key"],
        engine_threads=value["engine_threads"],
        contract=value["contract"],
        instruction=value["instruction"],
        autostart=value["autostart"],
        enabled=value["enabled"],
        check_sources=value["check_sources"],
        source_wait_s=value["source_wait"],
        output_watchdog_timeout_s=value["output_watchdog_timeout"],
        bond_heartbeat_period_s=value["bond_heartbeat_period"],
        server=ServerSettings(
            lossless=value["lossless"],
            queue_size=value["queue_size"],
            source_timeout_s=value["source_timeout"],
            future_tolerance_s=value["future_tolerance"],
            disarm_after_s=value["disarm_after"],
            inference_deadline_s=value["inference_deadline"],
            freeze_timeout_s=value["freeze_timeout"],
            chunk_grace_s=value["chunk_grace"],
            blending=value["blending"],
            ensemble_decay=value["ensemble_decay"],
        ),
    )
