"""Proof that an engine is what its plan says: formats and bytes read back, numbers compared with the torch policy.

The reference is the torch policy with the same layers quantized by the calibrator. Where all activations have 16 bits
both compute the same products, so their scores may differ by rounding only; each backend says how much its formats may
add.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from calibrator.data.calibration import load_calibration
from calibrator.families import TorchActor
from calibrator.families.loading import open_checkpoint
from calibrator.quantizers import Codes, Computed, quantize_policy
from calibrator.quantizers.store import Store
from engine_build.backends import find_backend
from engine_build.backends.base import Backend, Written
from engine_build.build import Policy, check_realised, export_graphs, unit_records
from engine_build.weights import layers_of
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest, UnitRecord
from vla_policy.core.observation import Observation, check_strays
from vla_policy.core.runner import Engine, load_engine

_SYNTHETIC_PIXELS = (256, 256, 3)
_INSTRUCTION = "pick up the object and place it in the basket"


@dataclass(frozen=True)
class Comparison:
    """An engine beside a torch policy over a number of states.

    What a policy decides by, its scores, is the action tokens' logits or, without tokens, the normalised actions.

    scores_error: root mean square difference of the scores over their standard deviation, worst state.
    scores_max_abs: largest difference of any score.
    cosine: smallest cosine between the two score vectors of a position, means removed.
    equal_tokens: share of action tokens that are equal. equal_decisions: share of states with all tokens equal.
    action_max_abs: largest difference of an action value, in the action's units, both deciding freely.
    stray_states: in which the torch policy prefers something else than an action.

    Without tokens the shares are None.
    """

    scores_error: float
    scores_max_abs: float
    cosine: float
    equal_tokens: float | None
    equal_decisions: float | None
    action_max_abs: float
    stray_states: int


def verify(
    engine_folder: Path,
    policy_folder: Path,
    calibration: Path | None,
    samples: int,
    seed: int = 0,
    unnorm_key: str | None = None,
    weights: Path | None = None,
) -> Manifest:
    """Checks the engine in `engine_folder` and records the outcome in its manifest.

    unnorm_key: which of the policy's statistics to use; may be left out if there is only one. weights: the store that
    the engine was packed from, if it was.

    Raises PolicyError for unknown statistics, and ArtefactError for damaged files, an engine of another policy, a
    realised format or size that differs from the plan, and scores outside the tolerance; the manifest is rewritten only
    if everything holds.
    """
    key = Manifest.load(engine_folder).config.unnorm_key(unnorm_key)
    manifest = verify_formats(engine_folder, policy_folder, weights)
    codes = _codes(engine_folder, manifest, weights)
    checked = manifest.with_reference_check(
        reference_check(engine_folder, manifest, policy_folder, codes, calibration, samples, seed, key)
    )
    checked.write(engine_folder)
    return checked


def verify_formats(engine_folder: Path, policy_folder: Path, weights: Path | None = None) -> Manifest:
    """The part of `verify` that runs nothing: what the engine holds now must be what the manifest says was planned."""
    manifest = Manifest.load(engine_folder)
    manifest.check_files(engine_folder)
    sha256 = sha256_policy(policy_folder)
    if sha256 != manifest.parents["policy"]:
        raise ArtefactError(
            f"{engine_folder}: built from the policy {manifest.parents['policy'][:12]}, {policy_folder} is "
            f"{sha256[:12]}; name the engine's own policy"
        )
    backend = find_backend(manifest.backend)
    now = _read_back(engine_folder, manifest, policy_folder, weights, backend)
    for read, unit in zip(now, manifest.units, strict=True):
        if read != unit:
            raise ArtefactError(f"{engine_folder}: {read.name} is {read}, the manifest says {unit}; build it again")
    check_realised(engine_folder, manifest.units, backend)
    return manifest


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


def _read_back(
    engine_folder: Path, manifest: Manifest, policy_folder: Path, weights: Path | None, backend: Backend
) -> tuple[UnitRecord, ...]:
    """The units' records, read again. A compiled engine is compared with graphs that are exported again for it."""
    layers = layers_of(manifest.config)
    planned = {unit.name: unit.choice for unit in manifest.units}
    built = {name: engine_folder / spec.file for name, spec in manifest.graphs.items()}
    if not backend.compiles:
        holders = {unit.name: unit.graph for unit in manifest.units}
        written = Written(engine_folder, manifest.graphs, manifest.program, holders)
        return unit_records(written, built, layers, planned, backend)
    with (
        tempfile.TemporaryDirectory(prefix=".verify.", dir=engine_folder.parent) as folder,
        open_checkpoint(policy_folder, manifest.config) as checkpoint,
    ):
        parent, peaks = manifest.parents["policy"], manifest.input_peaks
        codes = _codes(engine_folder, manifest, weights)
        policy = Policy(manifest.config, checkpoint, policy_folder, parent, peaks, codes)
        written = export_graphs(Path(folder), policy, layers, planned, backend)
        return unit_records(written, built, layers, planned, backend)


def reference_check(
    engine_folder: Path,
    manifest: Manifest,
    policy_folder: Path,
    codes: Codes,
    calibration: Path | None,
    samples: int,
    seed: int,
    unnorm_key: str,
) -> dict[str, Any]:
    """The `reference_check` entry of the manifest.

    Raises ArtefactError if the scores leave the tolerance, and PolicyError for a policy that decides something else
    than actions.
    """
    engine = load_engine(engine_folder, unnorm_key)
    states = reference_states(engine, calibration, samples, seed)
    actor = TorchActor.load(policy_folder, unnorm_key)
    against_full = compare(engine, actor, states, "against full precision")
    source = str(calibration) if calibration else "random images (--calibration names real states)"
    check_strays(against_full.stray_states, len(states), source)
    quantize_policy(actor.policy, {unit.name: unit.choice for unit in manifest.units}, codes)
    against_same = compare(engine, actor, states, "against the same formats in torch")
    tolerance = tolerance_of(manifest)
    what = engine.policy.scored
    if not against_same.scores_error <= tolerance:
        raise ArtefactError(
            f"{engine_folder}: {what} differ from the torch policy with the same formats by "
            f"{against_same.scores_error:.2e} of their standard deviation, allowed {tolerance:.0e}; build it again"
        )
    return {
        "states": len(states),
        "source": "calibration set" if calibration else f"random images, seed {seed}",
        "statistics": unnorm_key,
        "tolerance_scores_error": tolerance,
        "same_formats_in_torch": asdict(against_same),
        "full_precision_torch": asdict(against_full),
        "summary": f"{len(states)} states; torch with the same formats: {what} differ by "
        f"{against_same.scores_error:.1e} of their standard deviation (allowed {tolerance:g})"
        f"{_equal(against_same)}; torch in full precision: actions differ by up to {against_full.action_max_abs:.3g}"
        f"{_equal(against_full)}{_strays(against_full)}",
    }


def _equal(comparison: Comparison) -> str:
    return "" if comparison.equal_tokens is None else f", {comparison.equal_tokens:.1%} equal tokens"


def _strays(comparison: Comparison) -> str:
    states = comparison.stray_states
    return f"; in {states} of the states it prefers a token that is no action" if states else ""


def tolerance_of(manifest: Manifest) -> float:
    """Largest accepted `scores_error` against torch with the same formats."""
    backend = find_backend(manifest.backend)
    return max(backend.tolerance(Format.parse(unit.planned)) for unit in manifest.units)


def reference_states(engine: Engine, calibration: Path | None, samples: int, seed: int) -> list[Observation]:
    """States spread over the calibration set, or, without one, random images and in-range random states."""
    if calibration is not None:
        states = load_calibration(calibration)
        chosen = np.unique(np.linspace(0, len(states) - 1, min(samples, len(states))).round().astype(int))
        return [states.observation(int(index)) for index in chosen]
    generator = np.random.default_rng(seed)

    def image() -> np.ndarray:
        return generator.integers(0, 256, _SYNTHETIC_PIXELS, dtype=np.uint8)

    proprio = engine.config.stats(engine.unnorm_key).proprio
    return [
        Observation(
            image(),
            _INSTRUCTION,
            generator.uniform(proprio.low, proprio.high).astype(np.float32) if proprio else None,
            tuple(image() for _ in range(engine.config.num_images - 1)),
        )
        for _ in range(samples)
    ]


def compare(engine: Engine, actor: TorchActor, states: Sequence[Observation], title: str) -> Comparison:
    """Along the torch policy's decision for the scores, each deciding freely for tokens and actions."""
    errors, largest, cosines, equal, actions, strays = [], [], [], [], [], 0
    for state in tqdm(states, desc=title, unit="state", disable=None):
        expected, got = actor.act(state), engine.act(state)
        reference, stray = actor.scores_and_stray(state, expected.tokens)
        strays += stray
        difference = engine.scores(state, expected) - reference
        errors.append(float(np.sqrt((difference**2).mean()) / reference.std()))
        largest.append(float(np.abs(difference).max()))
        cosines.append(_smallest_cosine(reference, reference + difference))
        equal += [got.tokens == expected.tokens] if expected.tokens.size else []
        actions.append(float(np.abs(got.action - expected.action).max()))
    return Comparison(
        scores_error=max(errors),
        scores_max_abs=max(largest),
        cosine=min(cosines),
        equal_tokens=float(np.mean(equal)) if equal else None,
        equal_decisions=float(np.mean([row.all() for row in equal])) if equal else None,
        action_max_abs=max(actions),
        stray_states=strays,
    )


def _smallest_cosine(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left - left.mean(1, keepdims=True), right - right.mean(1, keepdims=True)
    return float(((left * right).sum(1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))).min())
