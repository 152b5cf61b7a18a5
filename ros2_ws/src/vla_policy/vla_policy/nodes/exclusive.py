"""One policy node per name and machine: a second one would send commands against the first."""

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path

from vla_policy.core.errors import ContractError


class NameLock:
    """Holds the node name `name` of ROS domain `domain_id` until `release` or the end of the process, however it ends.

    The ROS graph cannot tell: a killed node stays in it until its lease runs out, and its successor must start at once.
    """

    def __init__(self, name: str, domain_id: int) -> None:
        """Raises ContractError when another process holds the name."""
        key = hashlib.sha256(f"{domain_id} {name}".encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"vla_policy.{os.getuid()}.{key}.lock"
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise ContractError(
                f"{name}: another process on this machine runs a policy node of this name in ROS domain {domain_id}; "
                "end it, or rename this one with -r __node:=NAME"
            ) from error

    def release(self) -> None:
        os.close(self._descriptor)
