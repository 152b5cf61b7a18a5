"""ONNX Runtime: runs the graphs as they are written; what they became is read after its optimisations."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto

from engine_build.backends.base import (
    ROUNDED_ACTIVATIONS_TOLERANCE,
    Dialect,
    Layer,
    ReadBack,
    Seen,
    Written,
    deferred,
)
from engine_build.backends.onnxruntime.readback import read_back
from engine_build.backends.onnxruntime.tapped import TappedSession
from vla_policy.core.backends.base import Version
from vla_policy.core.backends.onnxruntime.probe import FILE, check_arithmetic
from vla_policy.core.backends.onnxruntime.session import open_session, session_options
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import GraphSpec, Session
from vla_policy.core.targets import Target

EXACT_TOLERANCE = 1e-4


class OnnxRuntime:
    """See the protocol. write_linear: the form of a layer. own_attention: see `Dialect`."""

    compiles = False
    float_error = 1e-4

    def __init__(self, write_linear: Callable[..., Any], own_attention: str | None = None) -> None:
        write_probe = partial(deferred("engine_build.backends.onnxruntime.probe", "write_probe"), write_linear)
        self._dialect = Dialect(
            TensorProto.FLOAT, write_linear, fused=True, own_attention=own_attention, probe=(FILE, write_probe)
        )

    def library(self) -> Path | None:
        """That of the operators which are not ONNX Runtime's own. Raises ArtefactError where it cannot be had."""
        return None

    def version(self) -> str:
        return str(onnxruntime.__version__)

    def dialect(self, version: Version) -> Dialect:
        return self._dialect

    def compile(self, written: Written, target: Target, replaced: Path) -> dict[str, GraphSpec]:
        if (written.folder / FILE).is_file():
            check_arithmetic(written.folder, open_session(written.folder / FILE, session_options(1, self.library())))
        return dict(written.graphs)

    def read_back(
        self, written: Path, built: Path, layers: Mapping[str, Layer], planned: Mapping[str, Format], scratch: Path
    ) -> ReadBack:
        return ReadBack(read_back(built, layers, scratch, self.library()))

    def filling(self, fmt: Format) -> tuple[int, int]:
        return 1, fmt.group_size or 1

    def tolerance(self, fmt: Format) -> float:
        return ROUNDED_ACTIVATIONS_TOLERANCE if fmt.activation_bits < 16 else EXACT_TOLERANCE

    def open_tapped(
        self, written: Written, manifest: Manifest, taps: Mapping[str, Collection[str]], seen: Seen, scratch: Path
    ) -> Session | None:
        return TappedSession(written.folder, manifest, taps, seen, self.library())

    def stored_result(self, graph: Path, layer: Layer, fmt: Format, x: np.ndarray) -> np.ndarray:
        raise ArtefactError(f"{layer.name}: not computed apart; `verify` compares layers beside the policy's")

    def needs_input_range(self, fmt: Format) -> bool:
        """Never: scales of activations are found per token while it runs."""
        return False

    def open_layer(self, graph: Path, threads: int) -> Callable[[Mapping[str, np.ndarray]], object]:
        session = open_session(graph, session_options(threads, self.library()))
        return lambda feeds: session.run(None, dict(feeds))


BACKEND = OnnxRuntime(deferred("engine_build.backends.onnxruntime.linear", "linear"))
