"""ONNX Runtime with kernels of this package for 8-bit activations, on x86-64 processors with AVX-512 VNNI.

Formats and numbers are those of `onnxruntime`, whose MatMulNBits is right for one row and slow for many: here one copy
of the packed weights serves both (`quantized_linear.cpp`), with AMX tiles where the processor has them.
"""

from dataclasses import replace
from pathlib import Path

from vla_policy.core.backends.base import ROW, Rule, Version, Workload
from vla_policy.core.backends.onnxruntime import BACKEND as PORTABLE
from vla_policy.core.backends.onnxruntime.onnx_files import external_files
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.processor import cpu_lacks
from vla_policy.core.program import Session

INSTRUCTIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
"""What Linux calls them."""


def runs_here(fmt: Format) -> bool:
    """Whether layers of this format run on the kernels of this package."""
    return fmt.weight_bits <= 8 and fmt.activation_bits == 8


class OnnxRuntimeVnni:
    """See the protocol."""

    name = "onnxruntime_vnni"
    fuses_groups = False
    splits_layers = False

    def rules(self, version: Version) -> tuple[Rule, ...]:
        return tuple(map(_with_kernel, PORTABLE.rules(version)))

    def refused(self, version: Version) -> tuple[tuple[str, str], ...]:
        return PORTABLE.refused(version)

    def why_faster_here(self, workload: Workload) -> str | None:
        """Wherever something is multiplied in 8 bits, and the processor and a compiler allow it."""
        from vla_policy.core.backends.onnxruntime_vnni.library import compiler

        if not any(map(runs_here, workload.formats)) or cpu_lacks(INSTRUCTIONS) or compiler() is None:
            return None
        return "8-bit activations, which this processor multiplies in VNNI or AMX"

    def files_named_in(self, graph: Path) -> set[str]:
        return external_files(graph)

    def open_session(self, folder: Path, manifest: Manifest, threads: int | None) -> Session:
        from vla_policy.core.backends.onnxruntime.session import OnnxRuntimeSession
        from vla_policy.core.backends.onnxruntime_vnni.library import library

        return OnnxRuntimeSession(folder, manifest, threads, library())


def _with_kernel(rule: Rule) -> Rule:
    if not any(map(runs_here, rule.formats())):
        return rule
    shared = "per token" if rule.groups == (ROW,) else "per token and group"
    return replace(rule, kernel=f"VNNI or AMX on packed codes: int8 activations {shared}, int32 sums")


BACKEND = OnnxRuntimeVnni()
