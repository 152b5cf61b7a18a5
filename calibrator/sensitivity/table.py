"""The sensitivity artefact: scores of every live layer, and what they were computed from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.measured import Measured
from calibrator.sensitivity.scores import ScoreSettings, evidence_loss, phase_of, soft_bottleneck, temporal_score
from calibrator.sensitivity.sweep import UnitLosses
from calibrator.tensors import save_tensors
from vla_policy.core.backends.base import LayerKind
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import named_file, read_json, sha256_file
from vla_policy.core.formats import FULL, Choice, Format, Rounding
from vla_policy.core.outputs import atomic_path
from vla_policy.core.targets import find_target

KIND = "sensitivity"
SCHEMA_VERSION = 3
Signal = Literal["evidence", "action", "proxy"]


@dataclass(frozen=True)
class UnitShape:
    """What a layer is, before anything is measured; see `calibrator.families.Unit`.

    inputs, outputs: sides of its weight as a matrix. macs: per action.
    """

    name: str
    label: str
    stage: str
    track: str
    segment: str
    kind: LayerKind
    group: str
    inputs: int
    outputs: int
    macs: int

    @property
    def params(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class UnitScores(UnitShape):
    """One layer's row: what it costs and what each choice does to the policy.

    Scores are by choice, full precision included as 0. omega, omega_tau: Mix-QVLA Eqs. (10), (13). action_mse: QVLA
    Eq. (4). action_proxy: its first-order estimate, empty where nobody asked for it. action_mse, likelihood_drop and
    boundary_loss lack the choices that a screened run did not evaluate.
    """

    omega: Mapping[Choice, float]
    omega_tau: Mapping[Choice, float]
    action_mse: Mapping[Choice, float]
    action_proxy: Mapping[Choice, float]
    likelihood_drop: Mapping[Choice, float]
    boundary_loss: Mapping[Choice, Mapping[str, float]]

    def evaluated(self, choice: Choice) -> bool:
        """Whether `choice` was evaluated on any state: then action error, likelihood and boundary losses are known."""
        return choice in self.action_mse

    def to_json(self) -> dict[str, Any]:
        scores = ("omega", "omega_tau", "action_mse", "action_proxy", "likelihood_drop")
        return {
            **{field.name: getattr(self, field.name) for field in fields(UnitShape)},
            "params": self.params,
            **{key: {str(choice): value for choice, value in getattr(self, key).items()} for key in scores},
            "boundary_loss": {str(choice): dict(values) for choice, values in self.boundary_loss.items()},
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any], choices: Mapping[str, Choice]) -> "UnitScores":
        """choices: by their text, which is the key of every score."""

        def by_choice(key: str) -> dict[Choice, float]:
            return {choices[text]: float(value) for text, value in raw[key].items()}

        return UnitScores(
            **{field.name: raw[field.name] for field in fields(UnitShape)},
            omega=by_choice("omega"),
            omega_tau=by_choice("omega_tau"),
            action_mse=by_choice("action_mse"),
            action_proxy=by_choice("action_proxy"),
            likelihood_drop=by_choice("likelihood_drop"),
            boundary_loss={choices[text]: dict(values) for text, values in raw["boundary_loss"].items()},
        )


@dataclass(frozen=True)
class Objective:
    """Eq. (14a): alpha Omega + beta Omega_tau, or QVLA's action error or its first-order estimate in their place."""

    alpha: float = 0.75
    beta: float = 0.25
    signal: Signal = "evidence"

    def score(self, unit: UnitScores, choice: Choice) -> float:
        """NaN where a run did not measure what the signal needs; an allocation refuses such a choice."""
        if self.signal == "action":
            return unit.action_mse[choice] if unit.evaluated(choice) else math.nan
        if self.signal == "proxy":
            return unit.action_proxy.get(choice, math.nan)
        return self.alpha * unit.omega[choice] + self.beta * unit.omega_tau[choice]


@dataclass(frozen=True)
class Estimate:
    """Omega and Omega_tau of one layer by choice, where screening estimated them from part of the states."""

    omega: np.ndarray
    omega_tau: np.ndarray


def score_unit(
    shape: UnitShape,
    losses: UnitLosses,
    action_proxy: np.ndarray | None,
    phases: np.ndarray,
    settings: ScoreSettings,
    estimate: Estimate | None = None,
) -> UnitScores:
    """Eqs. (8) to (13) for one layer. action_proxy: [choices, N], if there is one. phases: int64 [N], each state's bin.

    With an estimate, `losses` are NaN for states that were not evaluated, and the other scores average the rest.
    """
    per_boundary = evidence_loss(losses.mass, losses.attribution, settings.attribution_weight)
    if estimate is None:
        bottleneck = soft_bottleneck(per_boundary, settings.kappa)
        estimate = Estimate(bottleneck.mean(-1), temporal_score(bottleneck, phases))

    def by_choice(values: Sequence[float] | np.ndarray) -> dict[Choice, float]:
        return {choice: float(value) for choice, value in zip(losses.choices, values, strict=True)} | {FULL: 0.0}

    def evaluated(values: np.ndarray) -> dict[Choice, float]:
        """Means over the evaluated states; a choice without any has no entry."""
        known = {choice: row[np.isfinite(row)] for choice, row in zip(losses.choices, values, strict=True)}
        return {choice: float(row.mean()) for choice, row in known.items() if len(row)} | {FULL: 0.0}

    by_boundary = [evaluated(per_boundary[..., column]) for column in range(len(BOUNDARIES))]
    return UnitScores(
        **vars(shape),
        omega=by_choice(estimate.omega),
        omega_tau=by_choice(estimate.omega_tau),
        action_mse=evaluated(losses.action_error),
        action_proxy={} if action_proxy is None else by_choice(action_proxy.mean(-1)),
        likelihood_drop=evaluated(-losses.likelihood),
        boundary_loss={
            choice: {name: values[choice] for name, values in zip(BOUNDARIES, by_boundary, strict=True)}
            for choice in losses.choices
            if choice in by_boundary[0]
        },
    )


def below_floor(units: Sequence[UnitScores], choices: Sequence[Choice], floor: float) -> list[dict[str, Any]]:
    """Layers and the choices whose score is not above the noise floor: it says that nothing was seen, not how much."""
    found = {unit.name: [str(choice) for choice in choices if unit.omega[choice] <= floor] for unit in units}
    return [{"unit": name, "choices": below} for name, below in found.items() if below]


def inversions(units: Sequence[UnitScores], choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Where the more precise of two choices scored worse: noise of a small calibration set, reported, not clamped."""
    pairs = _neighbours(choices)
    return [
        {"unit": unit.name, "choices": [str(low), str(high)], "omega": [unit.omega[low], unit.omega[high]]}
        for unit in units
        for low, high in pairs
        if unit.omega[high] > unit.omega[low]
    ]


def _neighbours(choices: Sequence[Choice]) -> list[tuple[Choice, Choice]]:
    """Pairs of one recipe, the second more precise on some count and at least as precise on all, with none between."""
    pairs = [
        (low, high)
        for low, high in permutations(choices, 2)
        if low.recipe == high.recipe and high.format.is_at_least(low.format)
    ]
    return [
        (low, high)
        for low, high in pairs
        if not any((low, middle) in pairs and (middle, high) in pairs for middle in choices)
    ]


def shown_first(choices: Sequence[Choice]) -> Choice:
    """The choice that figures show first: one of 4 bits where there is one, else the least precise."""
    return next((choice for choice in choices if choice.format.weight_bits == 4), choices[0])


@dataclass(frozen=True)
class Sensitivity(Measured):
    """`sensitivity.json` as a type.

    choices: what was measured, the least precise first, and full precision. meta: every other entry of the file. path,
    sha256: the file's own.
    """

    units: tuple[UnitScores, ...]
    choices: tuple[Choice, ...]
    unquantized_params: int
    meta: Mapping[str, Any]
    path: str
    sha256: str

    @property
    def input_peaks(self) -> Mapping[str, float]:
        """Largest |input| over the calibration set, by layer; fixed scales of activations follow from it."""
        peaks: Mapping[str, float] = self.meta.get("input_peaks", {})
        return peaks

    def rounding(self, fmt: Format) -> Rounding:
        """How activations in a format were rounded: as on the machine that was named, or per token."""
        name: str | None = self.meta.get("target")
        return (find_target(name).rounding(fmt) if name else None) or Rounding.TOKEN

    @property
    def screened(self) -> Mapping[str, Any] | None:
        """What a screened run says of itself; None of an exhaustive table."""
        screening: Mapping[str, Any] | None = self.meta.get("screening")
        return screening

    @property
    def kept(self) -> tuple[str, ...]:
        """Layers that plans keep at 16 bits unless a pin names another choice."""
        return tuple(self.meta.get("kept", ()))

    @property
    def random_spread(self) -> float | None:
        """The action error of a decision that begins with other random numbers; None for a policy without any."""
        found = self.meta.get("random_spread")
        return None if found is None else float(found["action_mse"])

    def below_spread(self, choice: Choice) -> list[UnitScores]:
        """Layers that change the action less than other random numbers do, as far as they were evaluated."""
        spread = 0.0 if self.random_spread is None else self.random_spread
        return [unit for unit in self.units if unit.evaluated(choice) and unit.action_mse[choice] < spread]

    @property
    def noise_floor(self) -> float:
        """The Omega of a change that is none; scores that are not above it say nothing."""
        return float(self.meta["noise_floor"]["omega"])

    @staticmethod
    def load(path: Path | str) -> "Sensitivity":
        """Raises ArtefactError when the file is missing, damaged or of another kind or version."""
        raw = read_json(path, KIND, SCHEMA_VERSION)
        try:
            choices = tuple(map(Choice.from_json, raw["choices"]))
            by_text = {str(choice): choice for choice in choices}
            return Sensitivity(
                units=tuple(UnitScores.from_json(unit, by_text) for unit in raw["units"]),
                choices=choices,
                unquantized_params=raw["unquantized_params"],
                meta={key: value for key, value in raw.items() if key != "units"},
                path=str(path),
                sha256=sha256_file(path),
            )
        except KeyError as error:
            raise ArtefactError(f"{path}: entry {error} is missing; measure the sensitivity again") from error


def stack_losses(
    records: Sequence[UnitLosses],
    action_proxies: Sequence[np.ndarray] | None,
    progress: np.ndarray,
    settings: ScoreSettings,
) -> dict[str, np.ndarray]:
    """`losses.safetensors`: everything per layer, choice and state, in the order of the JSON.

    action_proxies: [choices, N] each, if there are any.
    """
    mass = np.stack([record.mass for record in records])
    attribution = np.stack([record.attribution for record in records])
    losses = evidence_loss(mass, attribution, settings.attribution_weight)
    return {
        "loss": losses.astype(np.float32),
        "mass": mass.astype(np.float32),
        "attribution": attribution.astype(np.float32),
        "soft_bottleneck": soft_bottleneck(losses, settings.kappa).astype(np.float32),
        "action_error": np.stack([record.action_error for record in records]).astype(np.float32),
        "likelihood": np.stack([record.likelihood for record in records]).astype(np.float32),
        **({} if action_proxies is None else {"action_proxy": np.stack(action_proxies).astype(np.float32)}),
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
    path = named_file(Path(sensitivity.path).parent, entry["name"])
    if sha256_file(path) != entry["sha256"]:
        raise ArtefactError(f"{path}: not the file that {sensitivity.path} was written with; measure again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtefactError(f"{path}: damaged or truncated ({error}); measure the sensitivity again") from error
