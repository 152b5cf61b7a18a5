"""TensorRT on the GPU that an engine was built on."""

from collections.abc import Collection
from pathlib import Path

from vla_policy.core.backends.base import ROW, Rule, Version
from vla_policy.core.formats import Format, Rounding
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import Session

BLOCKS = (ROW, 32, 64, 128)
COMMON_RULES = (
    Rule(16, 16, (ROW,), "float16"),
    Rule(8, 16, (ROW,), "INT8 weights, one scale per row, float16 MatMul"),
    Rule(
        8,
        8,
        (ROW,),
        "INT8 both; activations with one fixed scale per tensor, from the calibration set",
        rounding=Rounding.TENSOR,
    ),
    Rule(4, 16, BLOCKS, "INT4 weights in blocks, float16 MatMul"),
)
"""What TensorRT and TensorRT-RTX have alike."""
REFUSED = (
    ("w4a4", "TensorRT multiplies no 4-bit integers"),
    ("w2a8", "TensorRT has no such kernel, nor is there a plugin"),
    ("w3a16", "TensorRT has no 3-bit type"),
)
_PLUGINS_SINCE = (10, 9)  # plugins whose compiled kernels the engine carries
_PLUGIN_RULES = (
    Rule(2, 16, BLOCKS, "plugin of TensorRT 10.9: codes decoded in registers, float16 tensor cores"),
    Rule(4, 8, BLOCKS, "plugin of TensorRT 10.9: activations per token, int8 tensor cores"),
)


class TensorRt:
    """See the protocol."""

    name = "tensorrt"
    fuses_groups = True
    refused = REFUSED

    def rules(self, version: Version) -> tuple[Rule, ...]:
        return COMMON_RULES + (_PLUGIN_RULES if version >= _PLUGINS_SINCE else ())

    def is_faster_here(self, formats: Collection[Format]) -> bool:
        return False

    def files_named_in(self, graph: Path) -> set[str]:
        """None: an engine holds all that it needs."""
        return set()

    def open_session(self, folder: Path, manifest: Manifest, threads: int | None) -> Session:
        from vla_policy.core.backends.tensorrt.session import TensorRtSession, load_modules

        return TensorRtSession(folder, manifest, load_modules(self.name))


BACKEND = TensorRt()
