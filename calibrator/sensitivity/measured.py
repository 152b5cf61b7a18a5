"""What every table of scores says of its inputs."""

from collections.abc import Mapping
from typing import Any


class Measured:
    """meta: entries of the table's file beside its scores."""

    meta: Mapping[str, Any]

    @property
    def policy_sha256(self) -> str:
        return str(self.meta["policy"]["sha256"])

    @property
    def calibration_sha256(self) -> str:
        return str(self.meta["calibration"]["sha256"])

    @property
    def conventions(self) -> str:
        """Whether the states are in the policy's conventions, in a few words."""
        return str(self.meta.get("conventions", {}).get("summary", "conventions not checked"))
