"""TensorRT-RTX: engines built ahead of time, without their GPU. It imports neither plugins nor compiled kernels."""

from collections.abc import Collection
from pathlib import Path

from vla_policy.core.backends.base import Rule, Version
from vla_policy.core.backends.tensorrt import BLOCKS, COMMON_RULES, REFUSED
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import Session


class TensorRtRtx:
    """See the protocol."""

    name = "tensorrt_rtx"
    fuses_groups = True
    refused = REFUSED

    def rules(self, version: Version) -> tuple[Rule, ...]:
        two_bit = Rule(2, 16, BLOCKS, "two 2-bit codes to an INT4, split at run time, float16 MatMul")
        return (*COMMON_RULES, two_bit)

    def is_faster_here(self, formats: Collection[Format]) -> bool:
        return False

    def files_named_in(self, graph: Path) -> set[str]:
        """None: an engine holds all that it needs."""
        return set()

    def open_session(self, folder: Path, manifest: Manifest, threads: int | None) -> Session:
        from vla_policy.core.backends.tensorrt.session import TensorRtSession, load_modules

        return TensorRtSession(folder, manifest, load_modules(self.name))


BACKEND = TensorRtRtx()
