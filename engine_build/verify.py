"""Proof that an engine is what its plan says, on a folder that may be read-only: nothing is written into it.

Bytes: export is deterministic, so the policy is exported again as planned, and what that gives is compared with what
the engine holds: every tensor and the graphs, as they stream by. Of compiled graphs the hashes of all that went into
them are compared, and what stands in them byte for byte is sought again (`engine_build.exported`).

Formats: read back from what the backend makes of the graphs.

Numbers: the engine beside the torch policy with the same layers quantized by the calibrator, layer by layer where the
backend shows its values (`engine_build.layerwise`), and whole decisions. Where all activations have 16 bits, decisions
may differ by rounding only; each backend says how much its formats may add.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from calibrator.data.calibration import load_calibration
from calibrator.families import TorchActor
from calibrator.families.loading import open_checkpoint
from calibrator.quantizers import Codes, Computed, InputScales, quantize_policy
from calibrator.quantizers.rows import ROWS, WHOLE, RowBits
from calibrator.quantizers.store import Store
from engine_build import exported
from engine_build.backends import find_backend
from engine_build.backends.base import Backend, Written
from engine_build.build import Policy, export_graphs
from engine_build.compiled import as_packed, check_realised, describe_graphs, read_back, unit_records
from engine_build.golden import compare
from engine_build.graph.comparer import GraphComparer
from engine_build.layerwise import check_layers
from engine_build.numbers import check_scores, reference_of
from engine_build.reference import expected_of, reference_states, source_of
from engine_build.weights import layers_of, split
from vla_policy.core.backends.base import parse_version
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file, sha256_policy
from vla_policy.core.manifest import MANIFEST, Manifest, UnitRecord
from vla_policy.core.observation import check_strays
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import find_target
from vla_policy.core.verification import Reference, Verification

_COMPILED = (
    "what the builder merged or keeps in a form of its own; {}; the files have the hashes that the build recorded"
)


@dataclass(frozen=True)
class States:
    """What an engine is run on: states spread over a calibration set, or, without one, random ones of a seed.

    unnorm_key: which of the policy's statistics to use; may be left out if there is only one.
    """

    calibration: Path | None
    samples: int
    seed: int = 0
    unnorm_key: str | None = None


@dataclass(frozen=True)
class _Exported:
    """What the policy gives again. tensors, bytes: how many were compared with the engine's. not_compared: see
    Verification."""

    written: Written
    units: tuple[UnitRecord, ...]
    tensors: int
    bytes: int
    not_compared: str = ""


def verify(
    engine_folder: Path, policy_folder: Path, states: States | None, weights: Path | None = None
) -> Verification:
    """Checks the engine in `engine_folder`; without `states` nothing is run, which needs no GPU.

    weights: the store that the engine was packed from, if it was.

    Raises PolicyError for unknown statistics or a policy whose decisions are no actions, EngineError for an output that
    is not finite, and ArtefactError for damaged files, an engine of another policy, bytes that policy and plan do not
    give, a realised format or size that is not the planned one, and numbers outside the tolerances.
    """
    manifest = Manifest.load(engine_folder)
    key = None if states is None else manifest.config.unnorm_key(states.unnorm_key)
    manifest.check_files(engine_folder)
    sha256 = sha256_policy(policy_folder)
    if sha256 != manifest.parents["policy"]:
        raise ArtefactError(
            f"{engine_folder}: built from the policy {manifest.parents['policy'][:12]}, {policy_folder} is "
            f"{sha256[:12]}; name the engine's own policy"
        )
    _check_copies(engine_folder, manifest, policy_folder)
    codes = _codes(engine_folder, manifest, weights)
    backend = find_backend(manifest.backend)
    reference, parents = None, {"engine": sha256_file(engine_folder / MANIFEST), "policy": sha256}
    with tempfile.TemporaryDirectory(prefix="verify.") as folder:
        scratch = Path(folder)
        again = _export_again(engine_folder, manifest, policy_folder, codes, backend, scratch)
        _check_manifest(engine_folder, manifest, backend, again)
        if states is not None and key is not None and not manifest.packed:
            reference = _reference(engine_folder, manifest, policy_folder, codes, states, key, again.written, scratch)
            if states.calibration is not None:
                parents["calibration"] = load_calibration(states.calibration).sha256
    return Verification(
        engine=engine_folder.resolve().name,
        parents=parents,
        tensors=again.tensors,
        bytes=again.bytes,
        not_compared=again.not_compared,
        reference=reference,
    )


def _check_copies(engine_folder: Path, manifest: Manifest, policy_folder: Path) -> None:
    """What the engine holds of the policy as it is: the family's files, configuration and statistics."""
    config = PolicyConfig.load(policy_folder)
    if manifest.policy_config != config.raw:
        raise ArtefactError(f"{engine_folder / MANIFEST}: policy_config is not the policy's; build the engine again")
    for name in config.family.files:
        if sha256_file(engine_folder / name) != sha256_file(policy_folder / name):
            raise ArtefactError(f"{engine_folder / name}: not the policy's; build the engine again")


def _codes(engine_folder: Path, manifest: Manifest, weights: Path | None) -> Codes:
    """Where the engine's codes come from: the store that it was packed from, else they are computed again."""
    packed_from = manifest.parents.get("weights")
    store = Store.open(weights) if weights else None
    if packed_from != (store and store.sha256):
        raise ArtefactError(
            f"{engine_folder}: packed from {f'weights {packed_from[:12]}' if packed_from else 'no stored weights'}, "
            f"--weights names {store.sha256[:12] if store else 'none'}; name the engine's own"
        )
    return store or Computed()


def engine_rows(folder: Path, manifest: Manifest) -> RowBits:
    """The widths of rows of an engine's split layers."""
    return RowBits.load(folder / ROWS, manifest.files[ROWS].sha256) if ROWS in manifest.files else WHOLE


def _export_again(
    engine_folder: Path, manifest: Manifest, policy_folder: Path, codes: Codes, backend: Backend, scratch: Path
) -> _Exported:
    """Exports the policy as planned. Raises ArtefactError for bytes that the engine holds otherwise.

    scratch: for files of the engine's size.
    """
    whole, rows = layers_of(manifest.config), engine_rows(engine_folder, manifest)
    layers = split(whole, rows)
    planned = {unit.name: unit.choice for unit in manifest.units}
    if unknown := sorted(layers.keys() ^ planned.keys()):
        raise ArtefactError(f"{engine_folder / MANIFEST}: units are not the policy's layers, e.g. {unknown[0]}")
    dialect = backend.dialect(parse_version(manifest.written_for))
    built = {name: engine_folder / spec.file for name, spec in manifest.graphs.items()}
    comparers: list[GraphComparer] = []

    def new_comparer(path: Path, float_type: int) -> GraphComparer:
        comparers.append(GraphComparer(path, float_type))
        return comparers[-1]

    with open_checkpoint(policy_folder, manifest.config) as checkpoint:
        parent, peaks = manifest.parents["policy"], manifest.input_peaks
        policy = Policy(manifest.config, checkpoint, policy_folder, parent, peaks, codes)
        if backend.compiles and not manifest.packed:
            written = export_graphs(scratch, policy, whole, planned, dialect, rows)
        else:
            written = export_graphs(engine_folder, policy, whole, planned, dialect, rows, new_comparer)
            _refuse_differences(engine_folder, comparers)
    formats = {name: choice.format for name, choice in planned.items()}
    if manifest.packed:
        became = as_packed(written, layers, formats)
    else:
        became = read_back(written, built, layers, formats, backend, scratch)
    units = unit_records(written, became, layers, planned)
    if backend.compiles and not manifest.packed:
        now = describe_graphs(written, became)
        exported.check_same(engine_folder, exported.load(engine_folder)[1], now)
        sizes = [tensor.bytes for graph in now.values() for tensor in graph.tensors.values()]
        return _Exported(written, units, len(sizes), sum(sizes), _COMPILED.format(exported.summary(now)))
    tensors, count = (sum(getattr(one, what) for one in comparers) for what in ("tensors", "bytes"))
    return _Exported(written, units, tensors, count)


def _refuse_differences(engine_folder: Path, comparers: list[GraphComparer]) -> None:
    if found := [difference for comparer in comparers for difference in comparer.differences]:
        more = f" and {len(found) - 1} more tensors" if len(found) > 1 else ""
        raise ArtefactError(
            f"{engine_folder}: {found[0]}{more} not as policy and plan give them; altered, or written by another "
            "version: build it again"
        )


def _check_manifest(engine_folder: Path, manifest: Manifest, backend: Backend, again: _Exported) -> None:
    """The manifest's graphs, calls and units are what is there, and what is there was planned."""
    graphs = dict(again.written.graphs)
    if backend.compiles and not manifest.packed:
        graphs = {name: replace(spec, file=manifest.graphs[name].file) for name, spec in graphs.items()}
    if graphs != manifest.graphs:
        raise ArtefactError(f"{engine_folder / MANIFEST}: graphs are not the engine's; build it again")
    if dict(again.written.program) != manifest.program:
        raise ArtefactError(f"{engine_folder / MANIFEST}: program is not the policy's; build it again")
    for now, unit in zip(again.units, manifest.units, strict=True):
        if now != unit:
            raise ArtefactError(f"{engine_folder}: {now.name} is {now}, the manifest says {unit}; build it again")
    check_realised(engine_folder, manifest.units, backend)


def _reference(
    engine_folder: Path,
    manifest: Manifest,
    policy_folder: Path,
    codes: Codes,
    states: States,
    unnorm_key: str,
    written: Written,
    scratch: Path,
) -> Reference:
    """The numbers beside torch's.

    Raises ArtefactError where they leave a tolerance, and PolicyError for a policy that decides something else than
    actions.
    """
    engine = load_engine(engine_folder, unnorm_key)
    seen = reference_states(engine.config, unnorm_key, states.calibration, states.samples, states.seed)
    actor = TorchActor.load(policy_folder, unnorm_key)
    title = "torch, full precision"
    full = compare(engine, expected_of(actor, seen, title), seen, "engine beside it")
    source = str(states.calibration) if states.calibration else "random images (--calibration names real states)"
    check_strays(full.stray_states, len(seen), source)
    target = find_target(manifest.target).on(manifest.backend, parse_version(manifest.backend_version))
    choices, rows = {unit.name: unit.choice for unit in manifest.units}, engine_rows(engine_folder, manifest)
    quantize_policy(actor.policy, choices, codes, InputScales(target, manifest.input_peaks), rows)
    same = compare(engine, expected_of(actor, seen, "torch, the engine's formats"), seen, "engine beside it")
    check_scores(engine_folder, engine, same)
    layers = check_layers(engine_folder, manifest, written, find_backend(manifest.backend), actor, seen, scratch, rows)
    return reference_of(engine, source_of(states.calibration, states.seed), len(seen), same, full, layers)
