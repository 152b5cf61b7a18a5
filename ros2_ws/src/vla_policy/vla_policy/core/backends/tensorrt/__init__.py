"""TensorRT on the GPU that an engine was built on: what each release runs, by NVIDIA's documents.

"Working with Quantized Types": all quantization is symmetric; INT8 of weights and activations, INT4 of weights only,
in blocks of 64 or 128 along the inputs. "Support Matrix" and the release notes: JetPack 6 is TensorRT 10.3, JetPack
7.2.2 and later 11.4.1, which is strongly typed only, as all that is built here. Plugins whose compiled kernels an
engine carries came with 10.9; before, the engine's folder has a library of the same kernels.
"""

from pathlib import Path

from vla_policy.core.backends.base import ROW, LayerKind, Rule, Version, Workload
from vla_policy.core.formats import Rounding
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import Session

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
)
"""What TensorRT and TensorRT-RTX have alike."""
REFUSED = (
    ("w4a4", "TensorRT multiplies no 4-bit integers"),
    ("w2a8", "TensorRT has no such kernel, nor is there a plugin"),
    ("w3a16", "TensorRT has no 3-bit type"),
)
INT4_BLOCKS = (64, 128)
"""Inputs per scale that TensorRT takes for its INT4."""
_INT4 = Rule(4, 16, INT4_BLOCKS, "INT4 weights in blocks of 64 or 128, float16 MatMul")
SEQUENCE_LAYERS_SINCE = (10, 15)
"""Layers that write into a cache where it is and that turn queries and keys, and the parser's operators for them."""
# A plugin is no neighbour that TensorRT can fuse with, and vision towers gain nothing: their layers take INT8 Q/DQ.
_DECODER: tuple[LayerKind, ...] = ("linear", "head")
_GROUPS = (ROW, 32, 64, 128)
_PLUGIN_RULES = (
    Rule(2, 16, _GROUPS, "plugin: codes decoded in registers, float16 tensor cores", _DECODER),
    Rule(4, 16, (ROW, 32), "plugin: codes decoded in registers, float16 tensor cores", _DECODER),
    Rule(4, 8, _GROUPS, "plugin: activations per token, int8 tensor cores", _DECODER),
)


class TensorRt:
    """See the protocol."""

    name = "tensorrt"
    fuses_groups = True
    splits_layers = False

    def rules(self, version: Version) -> tuple[Rule, ...]:
        return (*COMMON_RULES, _INT4, *_PLUGIN_RULES)

    def refused(self, version: Version) -> tuple[tuple[str, str], ...]:
        return REFUSED

    def why_faster_here(self, workload: Workload) -> None:
        return None

    def files_named_in(self, graph: Path) -> set[str]:
        """None: an engine holds all that it needs."""
        return set()

    def open_session(self, folder: Path, manifest: Manifest, threads: int | None) -> Session:
        from vla_policy.core.backends.tensorrt.plugin_library import load_plugins
        from vla_policy.core.backends.tensorrt.session import TensorRtSession, load_modules

        modules = load_modules(self.name)
        load_plugins(folder, manifest, modules.tensorrt)
        return TensorRtSession(folder, manifest, modules)


BACKEND = TensorRt()
