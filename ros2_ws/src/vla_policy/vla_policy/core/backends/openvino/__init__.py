"""OpenVINO on the CPU: packed weights, multiplied as they are decoded. Groups are counted in inputs.

The type of activations is a setting of a whole engine, so there are two backends: float32 here, bfloat16 in
`openvino_bf16`.
"""

from enum import Enum
from pathlib import Path

from vla_policy.core.backends.base import ROW, Rule, Version, Workload
from vla_policy.core.backends.onnxruntime.onnx_files import external_files
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import Session

_NO_INT8 = "OpenVINO rounds activations for all layers of an engine or for none; ONNX Runtime has this format"
_NO_INT4 = "no kernel multiplies 4-bit activations here"
_NO_W3 = "OpenVINO has no 3-bit type"
GROUPS = (ROW, 32, 64, 128, 256)
LARGE = 10**8
"""Weights of a policy from which on products, and not what surrounds them, take most of the time."""


class Precision(Enum):
    """The type of activations, and of all arithmetic between layers; sums are float32 in both."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class OpenVino:
    """See the protocol. precision: of activations."""

    fuses_groups = False
    splits_layers = False

    def __init__(self, name: str, precision: Precision) -> None:
        self.name, self._precision = name, precision

    def rules(self, version: Version) -> tuple[Rule, ...]:
        activations = self._precision.value
        packed = f"FullyConnected: codes decoded as they are multiplied, {activations} activations"
        return (
            Rule(16, 16, (ROW,), f"FullyConnected: bf16 in the file, {activations} arithmetic"),
            *(Rule(bits, 16, GROUPS, packed) for bits in (8, 4, 2)),
        )

    def refused(self, version: Version) -> tuple[tuple[str, str], ...]:
        return (
            *((f"w{bits}a8", _NO_INT8) for bits in (8, 4, 2)),
            *((f"w{bits}a4", _NO_INT4) for bits in (4, 2)),
            ("w3a16", _NO_W3),
            ("w3a8", _NO_W3),
        )

    def why_faster_here(self, workload: Workload) -> str | None:
        """In bfloat16, for large policies of 16-bit activations, where it is installed and the processor has them."""
        if self._precision is Precision.FLOAT32 or workload.weights < LARGE:
            return None
        if any(fmt.activation_bits < FULL_PRECISION.activation_bits for fmt in workload.formats):
            return None
        from vla_policy.core.backends.openvino.graphs import check_processor

        try:
            check_processor(self._precision)
        except ArtefactError:
            return None
        return f"16-bit activations and {LARGE:.0e} weights or more, and this processor multiplies bfloat16"

    def files_named_in(self, graph: Path) -> set[str]:
        return external_files(graph)

    def open_session(self, folder: Path, manifest: Manifest, threads: int | None) -> Session:
        from vla_policy.core.backends.openvino.session import OpenVinoSession

        return OpenVinoSession(folder, manifest, self._precision, threads)


BACKEND = OpenVino("openvino", Precision.FLOAT32)
