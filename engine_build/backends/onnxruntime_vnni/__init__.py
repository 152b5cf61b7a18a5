"""ONNX Runtime with this project's own operators for layers with 8-bit activations and for attention to a growing
cache; all else is as in `onnxruntime`."""

from pathlib import Path

from engine_build.backends.base import LANE_INPUTS, LANES, deferred
from engine_build.backends.onnxruntime import OnnxRuntime
from vla_policy.core.backends.onnxruntime_vnni import runs_here
from vla_policy.core.backends.onnxruntime_vnni.library import DOMAIN, library
from vla_policy.core.formats import Format


class OnnxRuntimeVnni(OnnxRuntime):
    """See the protocol."""

    def library(self) -> Path | None:
        return library()

    def filling(self, fmt: Format) -> tuple[int, int]:
        return (LANES, fmt.group_size or LANE_INPUTS) if runs_here(fmt) else super().filling(fmt)


BACKEND = OnnxRuntimeVnni(deferred("engine_build.backends.onnxruntime_vnni.linear", "linear"), own_attention=DOMAIN)
