"""The bond to a lifecycle manager such as Nav2's: topic `bond`, the node's name as its id, while the node is active."""

import contextlib
import threading
from importlib import import_module
from typing import Any

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node

from vla_policy.core.errors import ContractError

_TIMEOUT_S = 4.0  # as Nav2's nodes


def bond_class() -> Any:
    """bondpy's Bond. Raises ContractError where the ROS package is missing."""
    with contextlib.suppress(ModuleNotFoundError):
        return import_module("bondpy.bondpy").Bond
    raise ContractError(
        "parameter bond_heartbeat_period: the ROS package bondpy is not installed; install it "
        "(apt install ros-$ROS_DISTRO-bondpy), or set 0.0 here and bond_timeout: 0.0 in the lifecycle manager"
    )


class ManagerBond:
    """Held until `close`, in a node and a thread of its own; the manager acts on its loss, this end only says so."""

    def __init__(self, owner: Node, period_s: float) -> None:
        """period_s: between heartbeats."""
        self._node = rclpy.create_node(
            f"{owner.get_name()}_bond",
            namespace=owner.get_namespace(),
            context=owner.context,
            use_global_arguments=False,
            start_parameter_services=False,
        )

        def broken() -> None:
            owner.get_logger().warning("the bond to the lifecycle manager is broken")

        self._bond = bond_class()(self._node, "bond", owner.get_name(), on_broken=broken)
        self._bond.set_heartbeat_period(period_s)
        self._bond.set_heartbeat_timeout(_TIMEOUT_S)
        self._bond.start()
        self._executor = SingleThreadedExecutor(context=owner.context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, name="bond", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tells the manager that this end is meant."""
        self._executor.shutdown(timeout_sec=2.0)
        self._thread.join(2.0)
        self._bond.set_broken_callback(None)
        self._bond.shutdown()
        self._node.destroy_node()

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self._executor.spin()
