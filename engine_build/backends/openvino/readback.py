"""Which format each layer of an OpenVINO engine really has: read from the graph that OpenVINO runs, and probed."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from engine_build.backends.base import Layer, Realised, canonical
from engine_build.backends.openvino.probe import probe
from vla_policy.core.backends.openvino import Precision
from vla_policy.core.backends.openvino.graphs import Running, compiled, version
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION, Format


def read_back(graph: Path, layers: Mapping[str, Layer], precision: Precision, scratch: Path) -> dict[str, Realised]:
    """Compiles `graph` as the runner will and reports each of `layers`, each format and size probed once.

    precision: of activations. scratch: a folder for the probes' graphs, which do not stay.

    Raises ArtefactError for a layer that is not found, or whose numbers are not those of its format.
    """
    running = compiled(graph, precision).layers
    if missing := [name for name in layers if name not in running]:
        raise ArtefactError(
            f"{graph}: layer {missing[0]} is not in the graph that OpenVINO {version()} runs; its format cannot be "
            "proven"
        )
    realised = {name: _realised(layer, running[name]) for name, layer in layers.items()}
    with tempfile.TemporaryDirectory(dir=scratch, prefix="probe.") as folder:
        for fmt, inputs in {(realised[name].format, layer.inputs) for name, layer in layers.items()}:
            probe(fmt, inputs, precision, Path(folder))
    return realised


def _realised(layer: Layer, running: Running) -> Realised:
    arithmetic = f"FullyConnected, {running.weights} weights, {running.activations} activations"
    fmt = FULL_PRECISION if running.group is None else Format(running.weight_bits, 16, running.group)
    return Realised(canonical(fmt, layer.inputs), arithmetic, running.resident_bytes)
