"""A bag over DDS through the real policy node: recorded bytes, quality of service and timing, as on the robot."""

from dataclasses import dataclass
from pathlib import Path

from evaluation.processes import ended_in_order, node_command, running
from evaluation.replay.run import Recording
from vla_policy.core.errors import ContractError

# An engine of the full size takes minutes to load, and no replayed decision is too late to be compared.
_START_TIMEOUT_S, _DEADLINE_S = 600.0, 60.0


@dataclass(frozen=True)
class ServingNode:
    """What the policy node serves, by which contract, and with which of the policy's statistics (None: the only)."""

    engine: Path
    contract: Path
    unnorm_key: str | None = None


def serve(node: ServingNode, recording: Recording, rate: float, served: Path) -> None:
    """Replays to a policy node in dry run; its decisions become the bag `served`, which must not exist.

    rate: times recorded speed, 0: as fast as the node answers. Raises
    ContractError when the replay cannot be done; the nodes' own messages are on stderr.
    """
    policy = node_command(
        "vla_policy.nodes.policy_node",
        {
            "engine_path": node.engine.resolve(),
            "unnorm_key": node.unnorm_key or "",
            "contract": node.contract.resolve(),
            "autostart": True,
            "lossless": True,
            "use_sim_time": True,
            "check_sources": "none",
            "inference_deadline": _DEADLINE_S,
        },
    )
    replay = node_command(
        "vla_policy.nodes.replay_node",
        {
            "bag": recording.bag.resolve(),
            "contract": node.contract.resolve(),
            "bag_namespace": recording.namespace,
            "instruction": recording.instruction,
            "rate": float(rate),
            "served": served.resolve(),
            "wait_for_subscribers": _START_TIMEOUT_S,
            "answer_timeout": _DEADLINE_S,
        },
    )
    with ended_in_order(), running(policy), running(replay) as replaying:
        if replaying.wait() != 0:
            raise ContractError(f"live replay ended with exit code {replaying.returncode}; its message is above")
