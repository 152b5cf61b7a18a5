"""From policy and plan to an engine folder whose formats have been read back from what will run."""

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from tqdm import tqdm

from engine_build.export import export
from engine_build.graph.linear_onnxruntime import linear
from engine_build.plan import Plan, check_legal, legalize, load_plan, uniform_plan
from engine_build.readback import Realised, canonical, read_back
from engine_build.weights import Layer, layers_of, open_checkpoint
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import atomic_folder, sha256_policy
from vla_policy.core.formats import FULL_PRECISION, Format
from vla_policy.core.manifest import TOKENIZER, GraphSpec, Manifest, UnitRecord, file_records
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.targets import Target

_TOWERS = "vision_backbone."


@dataclass(frozen=True)
class Request:
    """What to build. Exactly one of `plan` (a file) and `uniform` (a format for every layer) is given."""

    policy: Path
    target: Target
    out: Path
    plan: Path | None = None
    uniform: Format | None = None
    legalize: bool = False


def build(request: Request) -> Manifest:
    """Builds the engine folder `request.out`; nothing is left there unless every layer has its planned format.

    Raises ArtefactError for a plan of another policy, unknown or missing units, formats that the target cannot run, and
    a realised format that differs from the plan's.
    """
    config = PolicyConfig.load(request.policy)
    layers = layers_of(config)
    policy_sha256 = sha256_policy(request.policy)
    plan = _plan(request, policy_sha256, layers)
    with atomic_folder(request.out) as folder:
        shutil.copyfile(request.policy / TOKENIZER, folder / TOKENIZER)
        graphs = _export(request, folder, config, layers, plan)
        units, other_bytes = _prove(folder, graphs, layers, plan)
        manifest = Manifest(
            target=request.target.name,
            backend=request.target.backend,
            backend_version=onnxruntime.__version__,
            builder_version=metadata.version("vla-deploy"),
            graphs=graphs,
            units=units,
            files=file_records(folder),
            parents={"policy": policy_sha256} | ({"plan": plan.sha256} if plan.sha256 else {}),
            policy_config=config.raw,
            other_bytes=other_bytes,
            legalized=plan.legalized,
            ran_on_target=True,
            versions={"onnx": onnx.__version__, "python": platform.python_version()},
        )
        manifest.write(folder)
    return manifest


def _plan(request: Request, policy_sha256: str, layers: Mapping[str, Layer]) -> Plan:
    if request.plan is not None:
        plan = load_plan(request.plan, policy_sha256, layers)
    else:
        plan = uniform_plan(request.uniform or FULL_PRECISION, layers)
    if request.legalize:
        plan = legalize(plan, layers, request.target)
    check_legal(plan, layers, request.target)
    return plan


def _export(
    request: Request, folder: Path, config: PolicyConfig, layers: Mapping[str, Layer], plan: Plan
) -> dict[str, GraphSpec]:
    total = sum(layer.weights for layer in layers.values())
    bar: tqdm[Any] = tqdm(total=total, desc="packing weights", unit="weight", unit_scale=True, disable=None)

    def advance(layer: Layer) -> None:
        bar.update(layer.weights)

    with bar, open_checkpoint(request.policy, config) as checkpoint:
        return export(folder, config, checkpoint, layers, plan.assignment, linear, advance)


def _prove(
    folder: Path, graphs: Mapping[str, GraphSpec], layers: Mapping[str, Layer], plan: Plan
) -> tuple[tuple[UnitRecord, ...], int]:
    """Reads both graphs back; the units' records, and the bytes of everything that is no unit."""
    realised = realised_formats(folder, graphs, layers)
    stored = stored_bytes(folder, graphs, layers)
    units = tuple(
        unit_record(layer, plan.assignment[name], realised[name], stored[name]) for name, layer in layers.items()
    )
    check_realised(folder, units)
    counted = sum(unit.code_bytes + unit.scale_bytes for unit in units)
    return units, sum(record.bytes for record in file_records(folder).values()) - counted


def graph_of(layer: str) -> str:
    """Which graph a layer lives in."""
    return "vision" if layer.startswith((_TOWERS, "projector.")) else "decoder"


def realised_formats(folder: Path, graphs: Mapping[str, GraphSpec], layers: Mapping[str, Layer]) -> dict[str, Realised]:
    """What each layer became, from the graphs that ONNX Runtime runs."""
    realised: dict[str, Realised] = {}
    for name, spec in graphs.items():
        mine = {layer.name: layer for layer in layers.values() if graph_of(layer.name) == name}
        realised |= read_back(folder / spec.file, mine)
    return realised


def stored_bytes(
    folder: Path, graphs: Mapping[str, GraphSpec], layers: Mapping[str, Layer]
) -> dict[str, tuple[int, int]]:
    """Bytes of each layer's codes (or 16-bit weights) and of its scales in the engine's files."""
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


def check_realised(folder: Path, units: tuple[UnitRecord, ...]) -> None:
    """Raises ArtefactError for a layer whose format or bytes are not the planned ones."""
    for unit in units:
        smallest, largest = planned_bytes(unit)
        if unit.realised != str(canonical(Format.parse(unit.planned), unit.inputs)):
            raise ArtefactError(
                f"{folder}: {unit.name} was planned as {unit.planned} but runs as {unit.realised} ({unit.arithmetic})"
            )
        if not smallest <= unit.code_bytes <= largest:
            raise ArtefactError(
                f"{folder}: {unit.name} takes {unit.code_bytes} bytes, planned {unit.planned} takes {smallest}"
            )


def planned_bytes(unit: UnitRecord) -> tuple[int, int]:
    """Bytes that the planned format needs for a unit's codes: bare, and with the last group of inputs filled up."""
    fmt = Format.parse(unit.planned)
    group = fmt.group_size or unit.inputs
    padded = -(-unit.inputs // group) * group
    return -(-unit.weights * fmt.weight_bits // 8), -(-unit.outputs * padded * fmt.weight_bits // 8)


def unit_record(layer: Layer, planned: Format, realised: Realised, stored: tuple[int, int]) -> UnitRecord:
    """The manifest's entry of one layer. `stored`: bytes of codes and scales."""
    return UnitRecord(
        name=layer.name,
        kind=layer.kind,
        outputs=layer.outputs,
        inputs=layer.inputs,
        planned=str(planned),
        realised=str(realised.format),
        arithmetic=realised.arithmetic,
        code_bytes=stored[0],
        scale_bytes=stored[1],
        resident_bytes=realised.resident_bytes,
    )
