"""TensorRT-RTX: engines built ahead of time, without their GPU. It imports neither plugins nor compiled kernels.

It takes INT4 in blocks of any size and, unlike TensorRT, with one scale per tensor: two 2-bit codes fit in one INT4.
"""

from pathlib import Path

from vla_policy.core.backends.base import ROW, Rule, Version, Workload
from vla_policy.core.backends.tensorrt import COMMON_RULES, REFUSED
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import Session

_GROUPS = (ROW, 32, 64, 128)


class TensorRtRtx:
    """See the protocol."""

    name = "tensorrt_rtx"
    fuses_groups = True
    splits_layers = False

    def rules(self, version: Version) -> tuple[Rule, ...]:
        return (
            *COMMON_RULES,
            Rule(4, 16, _GROUPS, "INT4 weights in blocks, float16 MatMul"),
            Rule(2, 16, _GROUPS, "two 2-bit codes to an INT4, split at run time, float16 MatMul"),
        )

    def refused(self, version: Version) -> tuple[tuple[str, str], ...]:
        return REFUSED

    def why_faster_here(self, workload: Workload) -> None:
        return None

    def files_named_in(self, graph: Path) -> set[str]:
        """None: an engine holds all that it needs."""
        return set()

    def open_session(self, folder: Path, manifest: Manifest, threads: int | None) -> Session:
        from vla_policy.core.backends.tensorrt.session import TensorRtSession, load_modules

        return TensorRtSession(folder, manifest, load_modules(self.name))


BACKEND = TensorRtRtx()
