"""OpenVINO: runs the graphs as they are written, linear layers packed; what they became is read from what it runs."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
from onnx import TensorProto

from engine_build.backends.base import Dialect, Layer, ReadBack, Seen, Written, deferred
from engine_build.backends.openvino.tapped import TappedSession
from vla_policy.core.backends.base import Version
from vla_policy.core.backends.openvino import Precision
from vla_policy.core.backends.openvino.graphs import check_processor, compiled, version
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import GraphSpec, Session
from vla_policy.core.targets import Target


class OpenVino:
    """See the protocol. precision: of activations. tolerance: of all formats."""

    compiles = False

    def __init__(self, precision: Precision, tolerance: float, float_error: float) -> None:
        self._precision, self._tolerance, self.float_error = precision, tolerance, float_error

    def version(self) -> str:
        """Also raises ArtefactError on a processor that does not multiply the backend's activations."""
        check_processor(self._precision)
        return version()

    def dialect(self, version: Version) -> Dialect:
        return Dialect(TensorProto.FLOAT, deferred("engine_build.backends.openvino.linear", "linear"))

    def compile(self, written: Written, target: Target, replaced: Path) -> dict[str, GraphSpec]:
        return dict(written.graphs)

    def read_back(
        self, written: Path, built: Path, layers: Mapping[str, Layer], planned: Mapping[str, Format], scratch: Path
    ) -> ReadBack:
        from engine_build.backends.openvino.readback import read_back

        return ReadBack(read_back(built, layers, self._precision, scratch))

    def filling(self, fmt: Format) -> tuple[int, int]:
        from engine_build.backends.openvino.linear import RUN

        return 1, fmt.group_size or RUN

    def tolerance(self, fmt: Format) -> float:
        return self._tolerance

    def open_tapped(
        self, written: Written, manifest: Manifest, taps: Mapping[str, Collection[str]], seen: Seen, scratch: Path
    ) -> Session | None:
        return TappedSession(written.folder, manifest, self._precision, taps, seen)

    def stored_result(self, graph: Path, layer: Layer, fmt: Format, x: np.ndarray) -> np.ndarray:
        raise ArtefactError(f"{layer.name}: not computed apart; `verify` compares layers beside the policy's")

    def needs_input_range(self, fmt: Format) -> bool:
        """Never: activations are not rounded."""
        return False

    def open_layer(self, graph: Path, threads: int) -> Callable[[Mapping[str, np.ndarray]], object]:
        request = compiled(graph, self._precision, threads).model.create_infer_request()
        return lambda feeds: request.infer(dict(feeds), share_inputs=True, share_outputs=True)


BACKEND = OpenVino(Precision.FLOAT32, tolerance=1e-4, float_error=1e-4)
