"""ONNX Runtime on the CPU. Groups are counted in inputs; "row" means one scale per output channel."""

from pathlib import Path

from vla_policy.core.backends.base import MEMORY_ONLY, ROW, Rule, Version, Workload
from vla_policy.core.backends.onnxruntime.onnx_files import external_files
from vla_policy.core.formats import Rounding
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import Session

_NO_A4 = "no kernel multiplies 4-bit activations here"
_NO_W3 = "ONNX has no 3-bit type"
_UNPACKED = f"DequantizeLinear at run time, then float32 MatMul: {MEMORY_ONLY}"
_LEVEL_4 = "MatMulNBits at accuracy level 4: int8 activations per token and group"


class OnnxRuntime:
    """See the protocol."""

    name = "onnxruntime"
    fuses_groups = False
    splits_layers = True

    def rules(self, version: Version) -> tuple[Rule, ...]:
        return (
            Rule(16, 16, (ROW,), "MatMul: bf16 in the file, float32 arithmetic"),
            Rule(8, 16, (ROW, 32, 64, 128), _UNPACKED),
            Rule(4, 16, (16, 32, 64, 128, 256), "MatMulNBits at accuracy level 1: float32 activations"),
            Rule(4, 16, (ROW,), _UNPACKED),
            Rule(2, 16, (ROW, 32, 64, 128), _UNPACKED),
            Rule(8, 8, (ROW,), "MatMulInteger: 8-bit codes per token and per row, int32 sums"),
            *(Rule(bits, 8, (32, 64, 128), _LEVEL_4, rounding=Rounding.GROUP) for bits in (8, 4, 2)),
        )

    def refused(self, version: Version) -> tuple[tuple[str, str], ...]:
        return (("w4a4", _NO_A4), ("w2a4", _NO_A4), ("w3a16", _NO_W3), ("w3a8", _NO_W3))

    def why_faster_here(self, workload: Workload) -> None:
        return None

    def files_named_in(self, graph: Path) -> set[str]:
        return external_files(graph)

    def open_session(self, folder: Path, manifest: Manifest, threads: int | None) -> Session:
        from vla_policy.core.backends.onnxruntime.session import OnnxRuntimeSession

        return OnnxRuntimeSession(folder, manifest, threads)


BACKEND = OnnxRuntime()
