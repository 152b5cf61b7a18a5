"""ONNX Runtime: runs the graphs as they are written; what they became is read after its optimisations."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto

from engine_build.backends.base import ROUNDED_ACTIVATIONS_TOLERANCE, Dialect, Realised, Seen, Written
from engine_build.backends.onnxruntime.linear import linear
from engine_build.backends.onnxruntime.probe import write_probe
from engine_build.backends.onnxruntime.readback import read_back
from engine_build.backends.onnxruntime.tapped import TappedSession
from engine_build.graph.context import LinearWriter
from engine_build.weights import Layer
from vla_policy.core.backends.onnxruntime.probe import FILE, check_arithmetic
from vla_policy.core.backends.onnxruntime.session import open_session, session_options
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import GraphSpec, Session
from vla_policy.core.targets import Target

EXACT_TOLERANCE = 1e-4


class OnnxRuntime:
    """See the protocol. write_linear: the form of a layer."""

    compiles = False
    float_error = 1e-4

    def __init__(self, write_linear: LinearWriter) -> None:
        self.dialect = Dialect(
            TensorProto.FLOAT, write_linear, fused=True, probe=(FILE, partial(write_probe, write_linear))
        )

    def library(self) -> Path | None:
        """That of the operators which are not ONNX Runtime's own. Raises ArtefactError where it cannot be had."""
        return None

    def version(self) -> str:
        return str(onnxruntime.__version__)

    def compile(self, written: Written, target: Target, replaced: Path) -> dict[str, GraphSpec]:
        if (written.folder / FILE).is_file():
            check_arithmetic(written.folder, open_session(written.folder / FILE, session_options(1, self.library())))
        return dict(written.graphs)

    def read_back(
        self, written: Path, built: Path, layers: Mapping[str, Layer], planned: Mapping[str, Format], scratch: Path
    ) -> dict[str, Realised]:
        return read_back(built, layers, scratch, self.library())

    def filling(self, fmt: Format) -> tuple[int, int]:
        return 1, fmt.group_size or 1

    def tolerance(self, fmt: Format) -> float:
        return ROUNDED_ACTIVATIONS_TOLERANCE if fmt.activation_bits < 16 else EXACT_TOLERANCE

    def open_tapped(
        self, folder: Path, manifest: Manifest, taps: Mapping[str, Collection[str]], seen: Seen
    ) -> Session | None:
        return TappedSession(folder, manifest, taps, seen, self.library())

    def needs_input_range(self, fmt: Format) -> bool:
        """Never: scales of activations are found per token while it runs."""
        return False

    def open_layer(self, graph: Path, threads: int) -> Callable[[Mapping[str, np.ndarray]], object]:
        session = open_session(graph, session_options(threads, self.library()))
        return lambda feeds: session.run(None, dict(feeds))


BACKEND = OnnxRuntime(linear)
