"""The sensitivity artefact: scores of every live layer, and what they were computed from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.scores import ScoreSettings, evidence_loss, phase_of, soft_bottleneck, temporal_score
from calibrator.sensitivity.sweep import UnitLosses
from calibrator.tensors import save_tensors
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import read_json, sha256_file
from vla_policy.core.outputs import atomic_path

KIND = "sensitivity"
FULL_BITS = 16
Signal = Literal["evidence", "action", "proxy"]


@dataclass(frozen=True)
class UnitScores:
    """One layer's row: what it costs and what each bit-width does to the policy.

    inputs, outputs: sides of its weight as a matrix. macs: per action. Scores are by bit-width, 16 included as 0.
    omega, omega_tau: Mix-QVLA Eqs. (10), (13). action_mse: QVLA Eq. (4). action_proxy: its first-order estimate.
    action_mse, likelihood_drop and boundary_loss lack the widths that a screened run did not evaluate.
    """

    name: str
    stage: str
    group: str
    inputs: int
    outputs: int
    macs: int
    omega: Mapping[int, float]
    omega_tau: Mapping[int, float]
    action_mse: Mapping[int, float]
    action_proxy: Mapping[int, float]
    likelihood_drop: Mapping[int, float]
    boundary_loss: Mapping[int, Mapping[str, float]]

    @property
    def params(self) -> int:
        return self.inputs * self.outputs

    def evaluated(self, bits: int) -> bool:
        """Whether `bits` was evaluated on any state, so that action error, likelihood and boundary losses are known."""
        return bits in self.action_mse

    def to_json(self) -> dict[str, Any]:
        scores = ("omega", "omega_tau", "action_mse", "action_proxy", "likelihood_drop")
        return {
            "name": self.name,
            "stage": self.stage,
            "group": self.group,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "params": self.params,
            "macs": self.macs,
            **{key: {str(bits): value for bits, value in getattr(self, key).items()} for key in scores},
            "boundary_loss": {str(bits): dict(values) for bits, values in self.boundary_loss.items()},
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> "UnitScores":
        def by_bits(key: str) -> dict[int, float]:
            return {int(bits): float(value) for bits, value in raw[key].items()}

        return UnitScores(
            name=raw["name"],
            stage=raw["stage"],
            group=raw["group"],
            inputs=raw["inputs"],
            outputs=raw["outputs"],
            macs=raw["macs"],
            omega=by_bits("omega"),
            omega_tau=by_bits("omega_tau"),
            action_mse=by_bits("action_mse"),
            action_proxy=by_bits("action_proxy"),
            likelihood_drop=by_bits("likelihood_drop"),
            boundary_loss={int(bits): dict(values) for bits, values in raw["boundary_loss"].items()},
        )


@dataclass(frozen=True)
class Objective:
    """Eq. (14a): alpha Omega + beta Omega_tau, or QVLA's action error or its first-order estimate in their place."""

    alpha: float = 0.75
    beta: float = 0.25
    signal: Signal = "evidence"

    def score(self, unit: UnitScores, bits: int) -> float:
        """NaN where a screened run did not evaluate what the signal needs; an allocation refuses such a width."""
        if self.signal == "action":
            return unit.action_mse[bits] if unit.evaluated(bits) else math.nan
        if self.signal == "proxy":
            return unit.action_proxy[bits]
        return self.alpha * unit.omega[bits] + self.beta * unit.omega_tau[bits]


@dataclass(frozen=True)
class UnitShape:
    """What a layer is, before anything is measured."""

    name: str
    stage: str
    group: str
    inputs: int
    outputs: int
    macs: int


@dataclass(frozen=True)
class Estimate:
    """Omega and Omega_tau of one layer by width, where screening estimated them from part of the states."""

    omega: np.ndarray
    omega_tau: np.ndarray


def score_unit(
    shape: UnitShape,
    losses: UnitLosses,
    action_proxy: np.ndarray,
    phases: np.ndarray,
    settings: ScoreSettings,
    estimate: Estimate | None = None,
) -> UnitScores:
    """Eqs. (8) to (13) for one layer. action_proxy: [bits, N]. phases: int64 [N], the bin of each state of `losses`.

    With an estimate, `losses` are NaN for states that were not evaluated, and the other scores average the rest.
    """
    per_boundary = evidence_loss(losses.mass, losses.attribution, settings.weight)
    if estimate is None:
        bottleneck = soft_bottleneck(per_boundary, settings.kappa)
        estimate = Estimate(bottleneck.mean(-1), temporal_score(bottleneck, phases))

    def by_bits(values: Sequence[float] | np.ndarray) -> dict[int, float]:
        return {bits: float(value) for bits, value in zip(losses.bits, values, strict=True)} | {FULL_BITS: 0.0}

    def evaluated(values: np.ndarray) -> dict[int, float]:
        """Means over the evaluated states; a width without any has no entry."""
        known = {bits: row[np.isfinite(row)] for bits, row in zip(losses.bits, values, strict=True)}
        return {bits: float(row.mean()) for bits, row in known.items() if len(row)} | {FULL_BITS: 0.0}

    by_boundary = [evaluated(per_boundary[..., column]) for column in range(len(BOUNDARIES))]
    return UnitScores(
        name=shape.name,
        stage=shape.stage,
        group=shape.group,
        inputs=shape.inputs,
        outputs=shape.outputs,
        macs=shape.macs,
        omega=by_bits(estimate.omega),
        omega_tau=by_bits(estimate.omega_tau),
        action_mse=evaluated(losses.action_error),
        action_proxy=by_bits(action_proxy.mean(-1)),
        likelihood_drop=evaluated(-losses.likelihood),
        boundary_loss={
            bits: {name: values[bits] for name, values in zip(BOUNDARIES, by_boundary, strict=True)}
            for bits in losses.bits
            if bits in by_boundary[0]
        },
    )


def inversions(units: Sequence[UnitScores]) -> list[dict[str, Any]]:
    """Neighbouring widths where more bits scored worse: noise of a small calibration set, reported, not clamped."""
    found = []
    for unit in units:
        widths = sorted(unit.omega)
        for low, high in pairwise(widths):
            if unit.omega[high] > unit.omega[low]:
                found.append(
                    {"unit": unit.name, "bits": [low, high], "omega": [unit.omega[low], unit.omega[high]]}
                )
    return found


@dataclass(frozen=True)
class Sensitivity:
    """`sensitivity.json` as a type. `meta`: every other entry of the file; `path` and `sha256`: the file's own."""

    units: tuple[UnitScores, ...]
    bits: tuple[int, ...]
    scheme: str
    group_size: int | None
    unquantized_params: int
    meta: Mapping[str, Any]
    path: str
    sha256: str

    @property
    def policy_sha256(self) -> str:
        return str(self.meta["policy"]["sha256"])

    @staticmethod
    def load(path: Path | str) -> "Sensitivity":
        """Raises ArtefactError when the file is missing, damaged or of another kind."""
        raw = read_json(path, KIND)
        try:
            return Sensitivity(
                units=tuple(UnitScores.from_json(unit) for unit in raw["units"]),
                bits=tuple(raw["bits"]),
                scheme=raw["scheme"],
                group_size=raw["group_size"],
                unquantized_params=raw["unquantized_params"],
                meta={key: value for key, value in raw.items() if key != "units"},
                path=str(path),
                sha256=sha256_file(path),
            )
        except KeyError as error:
            raise ArtefactError(f"{path}: entry {error} is missing; measure the sensitivity again") from error


def stack_losses(
    records: Sequence[UnitLosses],
    action_proxies: Sequence[np.ndarray],
    progress: np.ndarray,
    settings: ScoreSettings,
) -> dict[str, np.ndarray]:
    """`losses.safetensors`: everything per layer, bit-width and state, in the order of `units` in the JSON.

    action_proxies: [bits, N] each.
    """
    mass = np.stack([record.mass for record in records])
    attribution = np.stack([record.attribution for record in records])
    losses = evidence_loss(mass, attribution, settings.weight)
    return {
        "loss": losses.astype(np.float32),
        "mass": mass.astype(np.float32),
        "attribution": attribution.astype(np.float32),
        "soft_bottleneck": soft_bottleneck(losses, settings.kappa).astype(np.float32),
        "action_error": np.stack([record.action_error for record in records]).astype(np.float32),
        "likelihood": np.stack([record.likelihood for record in records]).astype(np.float32),
        "action_proxy": np.stack(action_proxies).astype(np.float32),
        "progress": progress.astype(np.float64),
        "phase": phase_of(progress, settings.bins),
    }


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], kind: str) -> str:
    """Writes a safetensors file whole or not at all; returns its sha256."""
    with atomic_path(path, kind) as temporary:
        save_tensors(temporary, tensors, kind)
    return sha256_file(path)


def load_tensors(sensitivity: Sensitivity, which: str) -> dict[str, np.ndarray]:
    """The arrays of `losses` or `maps` beside a sensitivity file. Raises ArtefactError unless they belong to it."""
    entry = sensitivity.meta["files"].get(which)
    if entry is None:
        raise ArtefactError(f"{sensitivity.path}: has no {which}; measure the sensitivity again")
    path = Path(sensitivity.path).parent / entry["name"]
    if sha256_file(path) != entry["sha256"]:
        raise ArtefactError(f"{path}: not the file that {sensitivity.path} was written with; measure again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtefactError(f"{path}: damaged or truncated ({error}); measure the sensitivity again") from error
