"""From policy and plan to an engine folder whose formats have been read back from what will run."""

import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
from tqdm import tqdm

from calibrator.families import TorchActor
from calibrator.families.loading import Tensors, open_checkpoint
from calibrator.quantizers import Codes, Computed, InputScales, groups_per_row, quantize_policy, turns_inputs
from calibrator.quantizers.rows import ROWS, WHOLE, RowBits
from calibrator.quantizers.store import Store
from engine_build import exported
from engine_build.backends import find_backend
from engine_build.backends.base import Backend, Dialect, Layer, Written
from engine_build.compiled import PACKED, as_packed, check_realised, compile_graphs, describe_graphs, unit_records
from engine_build.conventions import conventions_note
from engine_build.export import export
from engine_build.golden import Golden
from engine_build.graph.builder import GraphBuilder
from engine_build.plan import Plan, check_computable, check_legal, legalize, load_plan, stored_plan, uniform_plan
from engine_build.ranges import input_peaks
from engine_build.reference import expected_of, reference_states, source_of
from engine_build.weights import layers_of, split
from vla_policy.core.backends.base import Workload, parse_version
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import FULL, Choice
from vla_policy.core.manifest import ENGINE, Manifest, file_records
from vla_policy.core.outputs import atomic_folder, check_folder
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.program import GraphSpec
from vla_policy.core.targets import Target


@dataclass(frozen=True)
class Request:
    """What to build. At most one of `plan` (a file), `weights` (a store of a plan's codes) and `uniform` (a choice for
    every layer); 16 bits without any.

    backend: one of the target's; None for the plan's, or without one for what `Target.fastest_here` takes.
    calibration: states whose conventions are checked, that fix the scales of activations where the backend needs them
    ahead and the plan has none, and golden states. unnorm_key: the statistics that these states are normalised by; the
    engine holds all.
    accept_conventions: go on where the states would fit the policy clearly better under another convention.
    golden: number of states whose decisions by the torch policy are kept in the engine; see `engine_build.golden`.
    pack: leave the graphs as they are, for the device that will compile them.
    """

    policy: Path
    target: Target
    out: Path
    plan: Path | None = None
    weights: Path | None = None
    uniform: Choice | None = None
    legalize: bool = False
    backend: str | None = None
    calibration: Path | None = None
    unnorm_key: str | None = None
    accept_conventions: bool = False
    golden: int = 0
    pack: bool = False


@dataclass(frozen=True)
class Policy:
    """What a build reads of a policy: tensors may come from a checkpoint or, to measure sizes, from a generator.

    folder: holds the files that the engine takes as they are. codes: of its layers' weights; computed unless they lie
    in a store. notes: what else a reader of the engine should know.
    """

    config: PolicyConfig
    tensors: Tensors
    folder: Path
    sha256: str
    input_peaks: Mapping[str, float] = field(default_factory=dict)
    codes: Codes = field(default_factory=Computed)
    notes: tuple[str, ...] = ()


def build(request: Request) -> Manifest:
    """Builds the engine folder `request.out`; nothing is left there unless every layer has its planned format.

    Raises PolicyError for unknown statistics, and ArtefactError for a folder there that is no engine, a file of the
    policy that is missing or does not fit, a plan of another policy, unknown or missing units, formats that the target
    cannot run, a backend that is not installed, and a realised format that differs from the plan's.
    """
    check_folder(request.out, ENGINE, [request.policy, request.plan, request.weights, request.calibration])
    config = PolicyConfig.load(request.policy)
    key = config.unnorm_key(request.unnorm_key or next(iter(config.norm_stats)))
    config.family.policy(config, request.policy, key)  # what a robot would refuse to load is not built
    layers = layers_of(config)
    policy_sha256 = sha256_policy(request.policy)
    store = Store.open(request.weights) if request.weights else None
    plan = _asked_for(request, store, policy_sha256, layers)
    layers = split(layers, plan.rows)
    target, why = chosen(request.target, request.backend, plan, layers)
    backend = find_backend(target.backend)
    if request.pack and not backend.compiles:
        raise ArtefactError(f"target {target.name} with {target.backend} compiles nothing; build without --pack")
    installed = None if request.pack else parse_version(backend.version())
    plan = _runnable(request, plan, target.on(None, installed), layers)
    if backend.compiles:
        _refuse_operators(plan, target)
    known = request.policy, request.plan, request.calibration, request.unnorm_key, request.accept_conventions
    notes = (conventions_note(*known), f"backend {target.backend}: {why}")
    peaks = _input_peaks(request, backend, plan)
    with open_checkpoint(request.policy, config) as checkpoint:
        policy = Policy(config, checkpoint, request.policy, policy_sha256, peaks, store or Computed(), notes)
        golden = _golden(request, plan, policy.codes, InputScales(target, peaks)) if request.golden else None
        return build_engine(policy, plan, target, request.out, golden, request.pack)


def chosen(target: Target, backend: str | None, plan: Plan, layers: Mapping[str, Layer]) -> tuple[Target, str]:
    """The target with the backend that runs the engine, and why: the one that was named, else the one that the plan's
    latencies were measured with, else what `Target.fastest_here` takes. layers: the plan's."""
    if backend is not None:
        return target.on(backend), "named with --backend"
    if plan.backend is not None:
        return target.on(plan.backend), "the plan's latencies were measured with it"
    weights = sum(layer.weights for layer in layers.values())
    return target.fastest_here(Workload(frozenset(plan.formats.values()), weights, bool(plan.rows)))


def _golden(request: Request, plan: Plan, codes: Codes, scales: InputScales) -> Golden:
    """The policy's decisions of some states, in full precision and as planned."""
    seed = 0
    actor = TorchActor.load(request.policy, request.unnorm_key)
    states = tuple(reference_states(actor.config, actor.unnorm_key, request.calibration, request.golden, seed))
    full = expected_of(actor, states, "golden states, full precision")
    quantize_policy(actor.policy, plan.assignment, codes, scales, plan.rows)
    same = expected_of(actor, states, "golden states, the engine's formats")
    return Golden(source_of(request.calibration, seed), actor.unnorm_key, states, same, full)


def build_engine(
    policy: Policy, plan: Plan, target: Target, out: Path, golden: Golden | None = None, pack: bool = False
) -> Manifest:
    """The part of `build` behind the checks of its inputs, for the target's first backend."""
    whole, backend = layers_of(policy.config), find_backend(target.backend)
    layers = split(whole, plan.rows)
    version = "" if pack else backend.version()
    with atomic_folder(out, ENGINE) as folder:
        for name in policy.config.family.files:
            shutil.copyfile(policy.folder / name, folder / name)
        if golden is not None:
            golden.save(folder)
        if plan.rows:
            plan.rows.save(folder / ROWS)
        written_for = target.runtimes[0].version if pack else parse_version(version)
        dialect = backend.dialect(written_for)
        written = export_graphs(folder, policy, whole, plan.assignment, dialect, plan.rows)
        if pack:
            graphs, became = dict(written.graphs), as_packed(written, layers, plan.formats)
        else:
            graphs, became = compile_graphs(written, target, out, layers, plan.formats, backend)
        units = unit_records(written, became, layers, plan.assignment)
        check_realised(out, units, backend)
        if backend.compiles:
            exported.save(folder, written.places, describe_graphs(written, became))
        _keep_only(folder, written.graphs, graphs)
        files = file_records(folder)
        counted = sum(unit.code_bytes + unit.scale_bytes for unit in units)
        manifest = Manifest(
            target=target.name,
            backend=target.backend,
            backend_version=version,
            written_for=".".join(map(str, written_for)),
            builder_version=metadata.version("vla-deploy"),
            graphs=graphs,
            program=dict(written.program),
            units=units,
            files=files,
            parents={"policy": policy.sha256, **plan.parents},
            policy_config=policy.config.raw,
            other_bytes=sum(record.bytes for record in files.values()) - counted,
            legalized=plan.legalized,
            input_peaks=dict(policy.input_peaks),
            notes=(*policy.notes, *_left_out(layers, plan), *_how_built(backend, pack)),
            versions={"onnx": onnx.__version__, "python": platform.python_version()},
        )
        manifest.write(folder)
    return manifest


_UNRUN = "not run where it was built: formats are proven by what the built engine holds, speed and numbers are not"


def _how_built(backend: Backend, pack: bool) -> tuple[str, ...]:
    if pack:
        return (PACKED,)
    return (_UNRUN,) if backend.compiles else ()


def _left_out(layers: Mapping[str, Layer], plan: Plan) -> Iterator[str]:
    """What no decision reads, and the bytes that it would take."""
    for name, layer in layers.items():
        if layer.rows is not None:
            fmt = plan.formats[name]
            scales = 0 if fmt.weight_bits == 16 else 2 * groups_per_row(layer.inputs, fmt)
            saved = layer.left_out * (layer.inputs * fmt.weight_bits // 8 + scales)
            yield (
                f"{name}: only rows {layer.rows.start} to {layer.rows.stop - 1}, which decisions read; the others, "
                f"{layer.left_out} rows and {saved:,} bytes in {fmt}, are left out"
            )


def _asked_for(request: Request, store: Store | None, policy_sha256: str, layers: Mapping[str, Layer]) -> Plan:
    if store is not None:
        return stored_plan(store, policy_sha256, layers)
    if request.plan is not None:
        return load_plan(request.plan, policy_sha256, layers)
    return uniform_plan(request.uniform or FULL, layers)


def _runnable(request: Request, plan: Plan, target: Target, layers: Mapping[str, Layer]) -> Plan:
    """The plan as the target runs it. Raises ArtefactError for formats that it does not, and codes that are missing."""
    if request.legalize:
        plan = legalize(plan, layers, target)
    check_legal(plan, layers, target)
    if request.weights is None:
        what = f"--plan {request.plan}" if request.plan else f"--uniform {request.uniform}"
        check_computable(plan, f"calibrator quantize --policy {request.policy} {what} --calibration C --out W")
    return plan


def _refuse_operators(plan: Plan, target: Target) -> None:
    """Raises ArtefactError for layers whose input goes through an operator: `prove` does not know them, nor do fixed
    scales, which are of inputs as they come."""
    turned = [name for name, choice in plan.assignment.items() if choice.recipe and turns_inputs(choice.recipe)]
    if turned:
        raise ArtefactError(
            f"plan: {turned[0]} is planned as {plan.assignment[turned[0]]}, whose input goes through an operator; "
            f"engines for {target.name} with {target.backend} have none; choose another method"
        )


def _input_peaks(request: Request, backend: Backend, plan: Plan) -> dict[str, float]:
    """Largest inputs of the layers whose activations the backend rounds with a fixed scale: those that were scored,
    where the plan has them."""
    names = [name for name, fmt in plan.formats.items() if backend.needs_input_range(fmt)]
    known = {name: plan.input_peaks[name] for name in names if name in plan.input_peaks}
    unknown = [name for name in names if name not in known]
    if not unknown:
        return known
    if request.calibration is None:
        raise ArtefactError(
            f"plan: {len(unknown)} layers have 8-bit activations, e.g. {unknown[0]}, for which "
            "the backend needs fixed scales; name states to take them from with --calibration"
        )
    return known | input_peaks(request.policy, request.calibration, unknown, request.unnorm_key)


def export_graphs(
    folder: Path,
    policy: Policy,
    layers: Mapping[str, Layer],
    assignment: Mapping[str, Choice],
    dialect: Dialect,
    rows: RowBits = WHOLE,
    new_builder: Callable[[Path, int], GraphBuilder] = GraphBuilder,
) -> Written:
    """Writes the policy's graphs in a backend's dialect, with a progress bar; see `export`."""
    total = sum(layer.weights for layer in layers.values())
    bar: tqdm[Any] = tqdm(total=total, desc="packing weights", unit="weight", unit_scale=True, disable=None)

    def advance(layer: Layer) -> None:
        bar.update(layer.weights)

    with bar:
        return export(
            folder, policy.config, policy.tensors, layers, assignment, policy.codes, dialect, advance,
            policy.input_peaks, rows, new_builder,
        )  # fmt: skip


def _keep_only(folder: Path, written: Mapping[str, GraphSpec], built: Mapping[str, GraphSpec]) -> None:
    """Removes the ONNX graphs whose weights compiled ones now hold."""
    for name, spec in written.items():
        if built[name].file != spec.file:
            (folder / spec.file).unlink()
            (folder / spec.file).with_suffix(".data").unlink()
