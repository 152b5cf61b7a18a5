"""TensorRT, on the device that runs the engine; formats that it lacks run by plugins of this package."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
from onnx import TensorProto

from engine_build.backends.base import ROUNDED_ACTIVATIONS_TOLERANCE, Dialect, Realised, Seen, Written
from engine_build.backends.tensorrt.builder import Module, build_engines
from engine_build.backends.tensorrt.linear import has_fixed_scale
from engine_build.backends.tensorrt.linear_plugin import is_plugin, linear
from engine_build.backends.tensorrt.readback import read_back
from engine_build.graph.context import LinearWriter
from engine_build.packing import RUN, SLAB
from engine_build.weights import Layer
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import GraphSpec, Session
from vla_policy.core.targets import Target

HALF_TOLERANCE = 0.02
"""Activations are float16."""



class TensorRt:
    """See the protocol. What TensorRT and TensorRT-RTX differ in is given: the module, and how layers are written."""

    compiles = True
    float_error = HALF_TOLERANCE

    def __init__(self, module: Module, linear: LinearWriter) -> None:
        self.module = module
        self.dialect = Dialect(TensorProto.FLOAT16, linear)

    def version(self) -> str:
        return str(self.module.load().__version__)

    def compile(self, written: Written, target: Target, replaced: Path) -> dict[str, GraphSpec]:
        return build_engines(self.module, target, written, replaced)

    def read_back(
        self, written: Path, built: Path, layers: Mapping[str, Layer], planned: Mapping[str, Format], scratch: Path
    ) -> dict[str, Realised]:
        return read_back(written, built, layers, planned)

    def filling(self, fmt: Format) -> tuple[int, int]:
        """Whole groups, and pairs where two 2-bit codes share an INT4."""
        return 1, fmt.group_size or (2 if fmt.weight_bits == 2 else 1)

    def tolerance(self, fmt: Format) -> float:
        return ROUNDED_ACTIVATIONS_TOLERANCE if fmt.activation_bits < 16 else HALF_TOLERANCE

    def open_tapped(
        self, folder: Path, manifest: Manifest, taps: Mapping[str, Collection[str]], seen: Seen
    ) -> Session | None:
        """None: an engine gives the outputs that it was built with."""
        return None

    def needs_input_range(self, fmt: Format) -> bool:
        return has_fixed_scale(fmt)

    def open_layer(self, graph: Path, threads: int) -> Callable[[Mapping[str, np.ndarray]], object]:
        raise ArtefactError(f"layers are not measured with {self.module.name}; name a CPU engine")


class WithPlugins(TensorRt):
    """TensorRT itself, whose plugins take codes in slabs and runs."""

    def filling(self, fmt: Format) -> tuple[int, int]:
        return (SLAB, RUN) if is_plugin(fmt) else super().filling(fmt)


_INSTALL = "install TensorRT 10.x on the device (JetPack brings it)"
BACKEND = WithPlugins(Module("tensorrt", _INSTALL, ahead=False), linear)
