"""The executables. A Python package that is missing is one line here, not a traceback from an import."""

import sys
from importlib import import_module

from vla_policy.core.requirements import not_installed


def policy_node() -> int:
    return _start("policy_node")


def record_node() -> int:
    return _start("record_node")


def replay_node() -> int:
    return _start("replay_node")


def _start(name: str) -> int:
    """The node's exit status; 2 where it cannot be imported."""
    try:
        module = import_module(f"vla_policy.nodes.{name}")
    except ModuleNotFoundError as error:
        print(f"error: {not_installed(error)}", file=sys.stderr)
        return 2
    return module.main()
