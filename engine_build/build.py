"""From policy and plan to an engine folder whose formats have been read back from what will run."""

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import TensorProto
from tqdm import tqdm

from calibrator.quantizers import Codes, Computed
from engine_build import readback, readback_tensorrt
from engine_build.backends import tensorrt
from engine_build.export import export
from engine_build.graph import builder, linear_onnxruntime, linear_plugin, linear_tensorrt
from engine_build.graph.context import LinearWriter
from engine_build.packing import RUN, SLAB
from engine_build.plan import Plan, check_legal, legalize, load_plan, uniform_plan
from engine_build.ranges import input_peaks
from engine_build.readback import Realised, canonical
from engine_build.weights import Layer, Tensors, layers_of, open_checkpoint
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import FULL, Choice, Format
from vla_policy.core.manifest import ENGINE, TIMING_CACHE, TOKENIZER, GraphSpec, Manifest, UnitRecord, file_records
from vla_policy.core.outputs import atomic_folder, check_folder
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.targets import Backend, Target

_TOWERS = "vision_backbone."


@dataclass(frozen=True)
class Dialect:
    """How the one exporter writes for a backend: activation type, operator set, and the form of a linear layer."""

    float_type: int
    opset: int
    linear: LinearWriter


DIALECTS: dict[Backend, Dialect] = {
    "onnxruntime": Dialect(TensorProto.FLOAT, builder.OPSET, linear_onnxruntime.linear),
    "tensorrt_rtx": Dialect(TensorProto.FLOAT16, 21, linear_tensorrt.linear),
    "tensorrt": Dialect(TensorProto.FLOAT16, 21, linear_plugin.linear),
}


@dataclass(frozen=True)
class Request:
    """What to build. At most one of `plan` (a file) and `uniform` (a choice for every layer); 16 bits without either.

    backend: one of the target's; None for its first.
    calibration: states that fix the activation scales of TensorRT's INT8 layers; not read otherwise. unnorm_key: the
    statistics that these states are normalised by; the engine holds all.
    """

    policy: Path
    target: Target
    out: Path
    plan: Path | None = None
    uniform: Choice | None = None
    legalize: bool = False
    backend: Backend | None = None
    calibration: Path | None = None
    unnorm_key: str | None = None


@dataclass(frozen=True)
class Policy:
    """What a build reads of a policy: tensors may come from a checkpoint or, to measure sizes, from a generator.

    codes: of its layers' weights; computed unless they lie in a store.
    """

    config: PolicyConfig
    tensors: Tensors
    tokenizer: Path
    sha256: str
    input_peaks: Mapping[str, float] = field(default_factory=dict)
    codes: Codes = field(default_factory=Computed)


def build(request: Request) -> Manifest:
    """Builds the engine folder `request.out`; nothing is left there unless every layer has its planned format.

    Raises PolicyError for unknown statistics, and ArtefactError for a folder there that is no engine, a plan of another
    policy, unknown or missing units, formats that the target cannot run, a backend that is not installed, and a
    realised format that differs from the plan's.
    """
    check_folder(request.out, ENGINE, [request.policy, request.plan, request.calibration])
    config = PolicyConfig.load(request.policy)
    if request.unnorm_key is not None:
        config.unnorm_key(request.unnorm_key)
    layers = layers_of(config)
    policy_sha256 = sha256_policy(request.policy)
    target = request.target.on(request.backend)
    plan = _plan(request, target, policy_sha256, layers)
    peaks = _input_peaks(request, target, plan)
    with open_checkpoint(request.policy, config) as checkpoint:
        policy = Policy(config, checkpoint, request.policy / TOKENIZER, policy_sha256, peaks)
        return build_engine(policy, plan, target, request.out)


def build_engine(policy: Policy, plan: Plan, target: Target, out: Path) -> Manifest:
    """The part of `build` behind the checks of its inputs, for the target's first backend."""
    layers, backend = layers_of(policy.config), target.backend
    if backend != "onnxruntime":
        tensorrt.load_module(backend)
    with atomic_folder(out, ENGINE) as folder:
        shutil.copyfile(policy.tokenizer, folder / TOKENIZER)
        graphs = export_graphs(folder, policy, layers, plan.assignment, backend)
        stored = stored_bytes(folder, graphs, layers)
        if backend == "onnxruntime":
            version, realised = onnxruntime.__version__, realised_formats(folder, graphs, layers)
        else:
            if (out / TIMING_CACHE).is_file():
                (folder / TIMING_CACHE).write_bytes(_former_timing_cache(out))
            built = tensorrt.build_engines(backend, target, folder, graphs, policy.config)
            engines = {name: folder / file for name, file in built.files.items()}
            version, realised = built.version, engine_formats(folder, graphs, engines, layers, plan.formats)
            graphs = _keep_only_engines(folder, graphs, built.files)
        units = tuple(
            unit_record(layer, plan.assignment[name], realised[name], stored[name]) for name, layer in layers.items()
        )
        check_realised(out, units, backend)
        files = file_records(folder)
        counted = sum(unit.code_bytes + unit.scale_bytes for unit in units)
        manifest = Manifest(
            target=target.name,
            backend=backend,
            backend_version=version,
            builder_version=metadata.version("vla-deploy"),
            graphs=graphs,
            units=units,
            files=files,
            parents={"policy": policy.sha256} | ({"plan": plan.sha256} if plan.sha256 else {}),
            policy_config=policy.config.raw,
            other_bytes=sum(record.bytes for record in files.values()) - counted,
            legalized=plan.legalized,
            input_peaks=dict(policy.input_peaks),
            ran_on_target=backend == "onnxruntime",
            notes=() if backend == "onnxruntime" else (_UNRUN,),
            versions={"onnx": onnx.__version__, "python": platform.python_version()},
        )
        manifest.write(folder)
    return manifest


def _former_timing_cache(out: Path) -> bytes:
    """Of the engine that is to be replaced. Raises ArtefactError where it is not the one that was built there."""
    try:
        return Manifest.load(out).read_file(out, TIMING_CACHE)
    except ArtefactError as error:
        raise ArtefactError(f"{error}; or delete {TIMING_CACHE} there, to build without it") from error


_UNRUN = "built but not run: formats are proven by the codes found in the engine, speed and numbers are not"


def _plan(request: Request, target: Target, policy_sha256: str, layers: Mapping[str, Layer]) -> Plan:
    if request.plan is not None:
        plan = load_plan(request.plan, policy_sha256, layers)
    else:
        plan = uniform_plan(request.uniform or FULL, layers)
    if request.legalize:
        plan = legalize(plan, layers, target)
    check_legal(plan, layers, target)
    return plan


def _input_peaks(request: Request, target: Target, plan: Plan) -> dict[str, float]:
    """Largest inputs of the layers whose activations TensorRT rounds with a fixed scale."""
    names = [name for name, fmt in plan.formats.items() if linear_tensorrt.has_fixed_scale(fmt)]
    if target.backend == "onnxruntime" or not names:
        return {}
    if request.calibration is None:
        raise ArtefactError(
            f"plan: {len(names)} layers have 8-bit activations, e.g. {names[0]}, for which "
            f"{target.backend} needs fixed scales; name states to take them from with --calibration"
        )
    return input_peaks(request.policy, request.calibration, names, request.unnorm_key)


def export_graphs(
    folder: Path, policy: Policy, layers: Mapping[str, Layer], assignment: Mapping[str, Choice], backend: Backend
) -> dict[str, GraphSpec]:
    """Writes the policy's graphs in the backend's dialect, with a progress bar."""
    total = sum(layer.weights for layer in layers.values())
    bar: tqdm[Any] = tqdm(total=total, desc="packing weights", unit="weight", unit_scale=True, disable=None)

    def advance(layer: Layer) -> None:
        bar.update(layer.weights)

    dialect = DIALECTS[backend]
    with bar:
        return export(
            folder, policy.config, policy.tensors, layers, assignment, policy.codes, dialect.linear, advance,
            dialect.float_type, dialect.opset, policy.input_peaks,
        )  # fmt: skip


def _keep_only_engines(folder: Path, graphs: Mapping[str, GraphSpec], files: Mapping[str, str]) -> dict[str, GraphSpec]:
    """Removes the ONNX graphs, whose weights the engines now hold."""
    for spec in graphs.values():
        (folder / spec.file).unlink()
        (folder / spec.file).with_suffix(".data").unlink()
    return {name: GraphSpec(files[name], spec.inputs, spec.outputs) for name, spec in graphs.items()}


def graph_of(layer: str) -> str:
    """Which graph a layer lives in."""
    return "vision" if layer.startswith((_TOWERS, "projector.")) else "decoder"


def _by_graph(layers: Mapping[str, Layer], graph: str) -> dict[str, Layer]:
    return {name: layer for name, layer in layers.items() if graph_of(name) == graph}


def realised_formats(folder: Path, graphs: Mapping[str, GraphSpec], layers: Mapping[str, Layer]) -> dict[str, Realised]:
    """What each layer became, from the graphs that ONNX Runtime runs."""
    realised: dict[str, Realised] = {}
    for name, spec in graphs.items():
        realised |= readback.read_back(folder / spec.file, _by_graph(layers, name))
    return realised


def engine_formats(
    folder: Path,
    graphs: Mapping[str, GraphSpec],
    engines: Mapping[str, Path],
    layers: Mapping[str, Layer],
    planned: Mapping[str, Format],
) -> dict[str, Realised]:
    """What each layer became, from the engines that TensorRT wrote for the graphs in `folder`."""
    realised: dict[str, Realised] = {}
    for name, spec in graphs.items():
        mine = _by_graph(layers, name)
        realised |= readback_tensorrt.read_back(folder / spec.file, engines[name], mine, planned)
    return realised


def stored_bytes(
    folder: Path, graphs: Mapping[str, GraphSpec], layers: Mapping[str, Layer]
) -> dict[str, tuple[int, int]]:
    """Bytes of each layer's codes (or 16-bit weights) and of its scales as written."""
    sizes: dict[str, int] = {}
    for spec in graphs.values():
        model = onnx.load(str(folder / spec.file), load_external_data=False)
        for tensor in model.graph.initializer:
            external = {entry.key: entry.value for entry in tensor.external_data}
            sizes[tensor.name] = int(external["length"]) if external else len(tensor.raw_data)
    return {
        name: (sizes.get(f"{name}.codes", sizes.get(f"{name}.weight", 0)), sizes.get(f"{name}.scales", 0))
        for name in layers
    }


def check_realised(folder: Path, units: tuple[UnitRecord, ...], backend: Backend) -> None:
    """Raises ArtefactError for a layer whose format or bytes are not the planned ones."""
    for unit in units:
        smallest, largest = planned_bytes(unit, backend)
        if unit.realised != str(canonical(Format.parse(unit.planned), unit.inputs)):
            raise ArtefactError(
                f"{folder}: {unit.name} was planned as {unit.planned} but runs as {unit.realised} ({unit.arithmetic})"
            )
        if not smallest <= unit.code_bytes <= largest:
            raise ArtefactError(
                f"{folder}: {unit.name} takes {unit.code_bytes} bytes, planned {unit.planned} takes {smallest}"
            )


def planned_bytes(unit: UnitRecord, backend: Backend) -> tuple[int, int]:
    """Bytes that the planned format needs for a unit's codes: bare, and with what the backend may fill up.

    Groups of inputs must be whole where codes lie in groups, pairs where two share an INT4, and slabs and runs where a
    plugin reads them.
    """
    fmt = Format.parse(unit.planned)
    rows, columns = 1, fmt.group_size or (2 if fmt.weight_bits == 2 else 1)
    if backend == "tensorrt" and linear_plugin.is_plugin(fmt):
        rows, columns = SLAB, RUN
    filled = -(-unit.outputs // rows) * rows * -(-unit.inputs // columns) * columns
    return -(-unit.weights * fmt.weight_bits // 8), -(-filled * fmt.weight_bits // 8)


def unit_record(layer: Layer, planned: Choice, realised: Realised, stored: tuple[int, int]) -> UnitRecord:
    """The manifest's entry of one layer. `stored`: bytes of codes and scales."""
    return UnitRecord(
        name=layer.name,
        kind=layer.kind,
        outputs=layer.outputs,
        inputs=layer.inputs,
        planned=str(planned.format),
        realised=str(realised.format),
        arithmetic=realised.arithmetic,
        code_bytes=stored[0],
        scale_bytes=stored[1],
        resident_bytes=realised.resident_bytes,
        recipe=planned.recipe,
    )
