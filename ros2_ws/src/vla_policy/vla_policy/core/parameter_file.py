"""For which nodes a ROS parameter file is written: one that names none of those that read it has no effect at all."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vla_policy.core.errors import ContractError

_PARAMETERS = "ros__parameters"
_WILDCARDS = {"/**": "(/[^/]+)*", "/*": "/[^/]+"}


def require_node(path: Path | str, node: str) -> None:
    """Raises ContractError unless the file has parameters for the node. node: its fully qualified name."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ContractError(f"{path}: not a readable parameter file ({' '.join(str(error).split())})") from error
    names = list(_nodes(content, ""))
    if not any(_matches(name, node) for name in names):
        told = ", ".join(names) or "no node"
        raise ContractError(f"{path}: has parameters for {told}, not for {node}; name it so, or /**")


def _nodes(content: Any, prefix: str) -> Iterator[str]:
    """Node names of a file, with wildcards; namespaces may be levels of their own."""
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key == _PARAMETERS:
            yield prefix
        else:
            yield from _nodes(value, f"{prefix}/{str(key).strip('/')}")


def _matches(pattern: str, node: str) -> bool:
    """A pattern that ends with a wildcard stands for every node below, as rcl takes it."""
    parts = re.split(r"(/\*\*|/\*(?=/|$))", pattern)
    expression = "".join(_WILDCARDS.get(part, re.escape(part)) for part in parts)
    return re.fullmatch(expression, node) is not None
