"""Executes an engine's graphs with OpenVINO on the CPU."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_policy.core.backends.base import check_version
from vla_policy.core.backends.openvino import Precision
from vla_policy.core.backends.openvino.graphs import TYPES, Running, check_processor, compiled, module, version
from vla_policy.core.errors import ArtefactError, EngineError
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.processor import cpu_name

if TYPE_CHECKING:
    import openvino as ov


@dataclass(frozen=True)
class Kept:
    """An output where OpenVINO left it: in the memory of the request that computed it."""

    tensor: "ov.Tensor"
    owner: "ov.InferRequest"

    def numpy(self) -> np.ndarray:
        """A copy."""
        return np.array(self.tensor.data)


class OpenVinoSession:
    """A compiled model per graph; what is kept is fed to the next call without being copied.

    shown: names of values inside the graphs, by graph, that become outputs.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        precision: Precision,
        threads: int | None = None,
        shown: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        check_version(folder, manifest, "openvino", version())
        check_processor(precision)
        self.processor = cpu_name()
        self._program = manifest.program
        self._outputs = {name: [spec.name for spec in graph.outputs] for name, graph in manifest.graphs.items()}
        self._models = {}
        for name, graph in manifest.graphs.items():
            inside = (shown or {}).get(name, ())
            ready = compiled(folder / graph.file, precision, threads, inside)
            for unit in manifest.units:
                if unit.graph == name:
                    realised, running = Format.parse(unit.realised), ready.layers.get(unit.name)
                    _check_layer(folder, unit.name, realised, TYPES[precision], running)
            self._models[name] = ready.model
            self._outputs[name] += inside
        self._requests: dict[str, list[ov.InferRequest]] = {name: [] for name in self._models}

    def run(self, call: str, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        graph = self._program[call].graph
        request = self._free_request(graph, feeds)
        tensor = module().Tensor
        given = {name: value.tensor if isinstance(value, Kept) else tensor(value) for name, value in feeds.items()}
        try:
            request.infer(given, share_inputs=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-300:]
            raise EngineError(f"OpenVINO {version()} cannot run the engine ({reason})") from error
        results = {name: request.get_tensor(name) for name in self._outputs[graph]}
        return {name: Kept(value, request) if name in keep else np.array(value.data) for name, value in results.items()}

    def _free_request(self, graph: str, feeds: Mapping[str, Any]) -> "ov.InferRequest":
        """One that owns none of the feeds: running it writes its outputs anew."""
        owners = [value.owner for value in feeds.values() if isinstance(value, Kept)]
        for request in self._requests[graph]:
            if all(request is not owner for owner in owners):
                return request
        self._requests[graph].append(self._models[graph].create_infer_request())
        return self._requests[graph][-1]


def _check_layer(folder: Path, name: str, realised: Format, activations: str, running: Running | None) -> None:
    """Raises ArtefactError for a layer that on this processor is not what was proven where the engine was built."""
    if running is None:
        found = "is not found in what runs"
    elif running.activations != activations:
        found = f"would multiply {running.activations} instead of {activations}"
    elif running.weight_bits != realised.weight_bits:
        found = f"would be unpacked to {running.weights}, proven was {realised}"
    else:
        return
    raise ArtefactError(
        f"{folder}: {name} {found} on {cpu_name()} with OpenVINO {version()}; build the engine on this machine with "
        "`engine_build build`, or with --backend onnxruntime"
    )
