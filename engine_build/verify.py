"""Proof that an engine is what its plan says, on a folder that may be read-only: nothing is written into it.

Bytes: export is deterministic, so the policy is exported again as planned, and what that gives is compared with what
the engine holds: every tensor and the graphs, as they stream by; of compiled graphs, which keep everything else in a
form of their own, the packed codes.

Formats: read back from what the backend makes of the graphs.

Numbers: the engine beside the torch policy with the same layers quantized by the calibrator, layer by layer where the
backend shows its values (`engine_build.layerwise`), and whole decisions. Where all activations have 16 bits, decisions
may differ by rounding only; each backend says how much its formats may add.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from calibrator.data.calibration import load_calibration
from calibrator.families import TorchActor
from calibrator.families.loading import open_checkpoint
from calibrator.quantizers import Codes, Computed, quantize_policy
from calibrator.quantizers.store import Store
from engine_build.backends import find_backend
from engine_build.backends.base import Backend, Place, Written
from engine_build.build import Policy, check_realised, export_graphs, unit_records
from engine_build.graph.comparer import GraphComparer
from engine_build.layerwise import check_layers
from engine_build.reference import compare, reference_states
from engine_build.weights import layers_of
from vla_policy.core.backends.base import parse_version
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file, sha256_policy
from vla_policy.core.formats import FULL_PRECISION, Format
from vla_policy.core.manifest import MANIFEST, Manifest, UnitRecord
from vla_policy.core.observation import check_strays
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import find_target
from vla_policy.core.verification import Decisions, Layers, Reference, Verification

_COMPILED = (
    "scales, 16-bit weights, norms, embeddings, biases and the graph, which the backend may keep in a form of its own; "
    "its files have the hashes that the build recorded"
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
    """What the policy gives again. tensors, bytes: how many were compared with the engine's."""

    written: Written
    units: tuple[UnitRecord, ...]
    tensors: int
    bytes: int


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
    with tempfile.TemporaryDirectory(prefix="verify.") as scratch:
        exported = _export_again(engine_folder, manifest, policy_folder, codes, backend, Path(scratch))
    _check_manifest(engine_folder, manifest, backend, exported)
    reference, parents = None, {"engine": sha256_file(engine_folder / MANIFEST), "policy": sha256}
    if states is not None and key is not None:
        reference = _reference(engine_folder, manifest, policy_folder, codes, states, key, exported.written.places)
        if states.calibration is not None:
            parents["calibration"] = load_calibration(states.calibration).sha256
    return Verification(
        engine=engine_folder.resolve().name,
        parents=parents,
        tensors=exported.tensors,
        bytes=exported.bytes,
        not_compared=_COMPILED if backend.compiles else "",
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


def _export_again(
    engine_folder: Path, manifest: Manifest, policy_folder: Path, codes: Codes, backend: Backend, scratch: Path
) -> _Exported:
    """Exports the policy as planned. Raises ArtefactError for bytes that the engine holds otherwise.

    scratch: for files of the engine's size.
    """
    layers = layers_of(manifest.config)
    planned = {unit.name: unit.choice for unit in manifest.units}
    if unknown := sorted(layers.keys() ^ planned.keys()):
        raise ArtefactError(f"{engine_folder / MANIFEST}: units are not the policy's layers, e.g. {unknown[0]}")
    built = {name: engine_folder / spec.file for name, spec in manifest.graphs.items()}
    comparers: list[GraphComparer] = []

    def new_comparer(path: Path, float_type: int) -> GraphComparer:
        comparers.append(GraphComparer(path, float_type))
        return comparers[-1]

    with open_checkpoint(policy_folder, manifest.config) as checkpoint:
        parent, peaks = manifest.parents["policy"], manifest.input_peaks
        policy = Policy(manifest.config, checkpoint, policy_folder, parent, peaks, codes)
        if backend.compiles:
            written = export_graphs(scratch, policy, layers, planned, backend)
        else:
            written = export_graphs(engine_folder, policy, layers, planned, backend, new_comparer)
            _refuse_differences(engine_folder, comparers)
    units = unit_records(written, built, layers, planned, backend, scratch)
    if backend.compiles:
        packed = [unit.code_bytes for unit in units if Format.parse(unit.planned) != FULL_PRECISION]
        return _Exported(written, units, len(packed), sum(packed))
    tensors, count = (sum(getattr(one, what) for one in comparers) for what in ("tensors", "bytes"))
    return _Exported(written, units, tensors, count)


def _refuse_differences(engine_folder: Path, comparers: list[GraphComparer]) -> None:
    if found := [difference for comparer in comparers for difference in comparer.differences]:
        more = f" and {len(found) - 1} more tensors" if len(found) > 1 else ""
        raise ArtefactError(
            f"{engine_folder}: {found[0]}{more} not as policy and plan give them; altered, or written by another "
            "version: build it again"
        )


def _check_manifest(engine_folder: Path, manifest: Manifest, backend: Backend, exported: _Exported) -> None:
    """The manifest's graphs, calls and units are what is there, and what is there was planned."""
    graphs = dict(exported.written.graphs)
    if backend.compiles:
        graphs = {name: replace(spec, file=manifest.graphs[name].file) for name, spec in graphs.items()}
    if graphs != manifest.graphs:
        raise ArtefactError(f"{engine_folder / MANIFEST}: graphs are not the engine's; build it again")
    if dict(exported.written.program) != manifest.program:
        raise ArtefactError(f"{engine_folder / MANIFEST}: program is not the policy's; build it again")
    for now, unit in zip(exported.units, manifest.units, strict=True):
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
    places: Mapping[str, Place],
) -> Reference:
    """The numbers beside torch's.

    Raises ArtefactError where they leave a tolerance, and PolicyError for a policy that decides something else than
    actions.
    """
    engine = load_engine(engine_folder, unnorm_key)
    seen = reference_states(engine, states.calibration, states.samples, states.seed)
    actor = TorchActor.load(policy_folder, unnorm_key)
    full = compare(engine, actor, seen, "against full precision")
    source = str(states.calibration) if states.calibration else "random images (--calibration names real states)"
    check_strays(full.stray_states, len(seen), source)
    target = find_target(manifest.target).on(manifest.backend, parse_version(manifest.backend_version))
    quantize_policy(actor.policy, {unit.name: unit.choice for unit in manifest.units}, codes, target.rounding)
    same = compare(engine, actor, seen, "against the same formats in torch")
    allowed, what = tolerance_of(manifest), engine.policy.scored
    if not same.scores_error <= allowed:
        raise ArtefactError(
            f"{engine_folder}: {what} differ from the torch policy with the same formats by "
            f"{same.scores_error:.2e} of their standard deviation, allowed {allowed:.0e}; build it again"
        )
    layers = check_layers(engine_folder, manifest, places, find_backend(manifest.backend), actor, seen)
    return Reference(
        processor=engine.processor,
        states=len(seen),
        source="calibration set" if states.calibration else f"random images, seed {states.seed}",
        statistics=unnorm_key,
        allowed=allowed,
        same_formats=same,
        full_precision=full,
        layers=layers,
        summary=f"{len(seen)} states; torch with the same formats: {what} differ by {same.scores_error:.1e} of their "
        f"standard deviation (allowed {allowed:g}){_equal(same)}{_by_format(layers)}; torch in full precision: actions "
        f"differ by up to {full.action_max_abs:.3g}{_equal(full)}{_strays(full)}",
    )


def _equal(decisions: Decisions) -> str:
    return "" if decisions.equal_tokens is None else f", {decisions.equal_tokens:.1%} equal tokens"


def _strays(decisions: Decisions) -> str:
    states = decisions.stray_states
    return f"; in {states} of the states it prefers a token that is no action" if states else ""


def _by_format(layers: Layers | None) -> str:
    if layers is None:
        return ""
    of = [f"{fmt} {found.error:.0e} (allowed {found.allowed:g})" for fmt, found in sorted(layers.formats.items())]
    return f", single layers by up to {', '.join(of)}, between them {layers.between.error:.0e}"


def tolerance_of(manifest: Manifest) -> float:
    """Largest accepted `scores_error` of whole decisions against torch with the same formats."""
    backend = find_backend(manifest.backend)
    return max(backend.tolerance(Format.parse(unit.planned)) for unit in manifest.units)
