"""Policy and plan to ONNX: a family's graphs, their weights packed as planned, streamed to disk layer by layer."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from onnx import TensorProto, helper

from calibrator.families.loading import Tensors
from calibrator.quantizers import Codes
from calibrator.quantizers.rows import RowBits
from engine_build.backends.base import Dialect, Place, Written
from engine_build.families import find_family
from engine_build.graph.builder import GraphBuilder
from engine_build.graph.context import GraphContext
from engine_build.weights import Layer
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION, Choice
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.program import GraphSpec, TensorSpec, check_program

_ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}


def export(
    folder: Path,
    config: PolicyConfig,
    tensors: Tensors,
    layers: Mapping[str, Layer],
    assignment: Mapping[str, Choice],
    codes: Codes,
    dialect: Dialect,
    on_layer: Callable[[Layer], None],
    input_peaks: Mapping[str, float],
    rows: RowBits,
    new_builder: Callable[[Path, int], GraphBuilder] = GraphBuilder,
) -> Written:
    """Writes every graph of the policy as `<graph>.onnx` with its `.data` into `folder`; same input, same bytes.

    layers: whole ones; `rows` says which of them are split, and the assignment names their parts. new_builder: what
    writes a graph to a path, with its type of activations.

    Raises ArtefactError for a layer that is in no graph or in two.
    """
    places: dict[str, Place] = {}

    def note(graph: str, layer: Layer, x: str, result: str) -> None:
        if layer.name in places:
            raise ArtefactError(f"{layer.name}: written into graph {places[layer.name].graph} and again into {graph}")
        places[layer.name] = Place(graph, x, result)
        on_layer(layer)

    family = find_family(config)
    graphs: dict[str, GraphSpec] = {}
    for name, write in family.graphs.items():
        with new_builder(folder / f"{name}.onnx", dialect.float_type) as builder:
            on_written = partial(note, name)
            context = GraphContext(
                builder, tensors, layers, assignment, codes, dialect.linear, on_written, input_peaks,
                fused=dialect.fused, own_attention=dialect.own_attention, rows=rows, sequences=dialect.sequences,
            )  # fmt: skip
            inputs, outputs = write(context, config)
            builder.save([_info(spec) for spec in inputs], [_info(spec) for spec in outputs])
        graphs[name] = GraphSpec(f"{name}.onnx", tuple(inputs), tuple(outputs))
    missing = [name for name in rows.units(layers) if name not in places]
    if missing:
        raise ArtefactError(f"{missing[0]}: a layer of the policy that no graph holds")
    program = family.program(config, dialect.sequences)
    check_program(graphs, program)
    quantized = sorted({choice.format for choice in assignment.values()} - {FULL_PRECISION}, key=str)
    if dialect.probe is not None and quantized:
        file, write_probe = dialect.probe
        with new_builder(folder / file, dialect.float_type) as builder:
            write_probe(builder, quantized)
    return Written(folder, graphs, program, places)


def _info(spec: TensorSpec) -> "helper.ValueInfoProto":
    return helper.make_tensor_value_info(spec.name, _ONNX_TYPES[spec.dtype], list(spec.shape))
