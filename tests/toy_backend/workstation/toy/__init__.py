"""A toy backend's build side: 8-bit codes times scales, and "compiled" graphs that hold their data themselves."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from engine_build.backends.base import Dialect, ReadBack, Realised, Seen, Written
from engine_build.graph.builder import GraphBuilder
from engine_build.weights import Layer, LayerWeights
from vla_policy.core.backends.base import Version
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION, Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import GraphSpec, Session
from vla_policy.core.targets import Target


def linear(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
    name = weights.layer.name
    if weights.quantized is None:
        kernel = builder.tensor(f"{name}.weight", weights.rows.float().numpy().T)
    else:
        codes = builder.cast(builder.tensor(f"{name}.codes", weights.codes.T), TensorProto.FLOAT)
        kernel = builder.mul(codes, builder.tensor(f"{name}.scales", weights.scales.T.astype(np.float32)))
    result = builder.matmul(x, kernel)
    return result if weights.bias is None else builder.add(result, builder.tensor(f"{name}.bias", weights.bias))


class Toy:
    compiles = True
    float_error = 1e-4

    def version(self) -> str:
        return "2.0"

    def dialect(self, version: Version) -> Dialect:
        return Dialect(TensorProto.FLOAT, linear)

    def compile(self, written: Written, target: Target, replaced: Path) -> dict[str, GraphSpec]:
        built = {name: replace(spec, file=f"{name}.toy") for name, spec in written.graphs.items()}
        for name, spec in written.graphs.items():
            onnx.save(onnx.load(str(written.folder / spec.file)), str(written.folder / built[name].file))
        return built

    def read_back(
        self, written: Path, built: Path, layers: Mapping[str, Layer], planned: Mapping[str, Format], scratch: Path
    ) -> ReadBack:
        tensors = {tensor.name: tensor for tensor in onnx.load_from_string(built.read_bytes()).graph.initializer}
        found = {}
        for name, layer in layers.items():
            fmt = Format(8, 16) if f"{name}.codes" in tensors else FULL_PRECISION
            found[name] = Realised(fmt, "MatMul", layer.weights * fmt.weight_bits // 8)
        return ReadBack(found)

    def filling(self, fmt: Format) -> tuple[int, int]:
        return 1, 1

    def tolerance(self, fmt: Format) -> float:
        return 1e-4

    def open_tapped(
        self, written: Written, manifest: Manifest, taps: Mapping[str, Collection[str]], seen: Seen, scratch: Path
    ) -> Session | None:
        return None

    def stored_result(self, graph: Path, layer: Layer, fmt: Format, x: np.ndarray) -> np.ndarray:
        raise ArtefactError(f"{layer.name}: not computed apart; `verify` compares layers beside the policy's")

    def needs_input_range(self, fmt: Format) -> bool:
        return False

    def open_layer(self, graph: Path, threads: int) -> Callable[[Mapping[str, np.ndarray]], object]:
        raise ArtefactError("nobody waits for the toy")


BACKEND = Toy()
