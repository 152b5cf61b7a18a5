"""What one layer's low precision does to the policy: losses per choice and state, Mix-QVLA Eqs. (2) to (8)."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrator.data.calibration import load_calibration
from calibrator.families import Policy, live_units, load_policy
from calibrator.quantizers import quantized
from calibrator.sensitivity.arithmetic import float32_products
from calibrator.sensitivity.evidence import (
    BOUNDARIES,
    EPSILON,
    Profile,
    evidence_map,
    jensen_shannon,
    mass_distortion,
    profile,
)
from calibrator.sensitivity.passes import Signals, Trunk, signals
from calibrator.sensitivity.scores import check_finite
from calibrator.sensitivity.states import Reference, States, reference
from vla_policy.core.errors import PolicyError
from vla_policy.core.formats import FULL, Choice
from vla_policy.core.policy_config import PolicyConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SweepSettings:
    """What the numbers depend on.

    choices: what every layer is measured in; full precision is the reference. language_block: decoder block whose input
    is the language boundary, None for the last. dtype: how matrices are held; all arithmetic is float32.
    """

    choices: tuple[Choice, ...]
    language_block: int | None = None
    epsilon: float = EPSILON
    dtype: str = "float32"
    unnorm_key: str | None = None

    def __post_init__(self) -> None:
        if not self.choices or len(set(self.choices)) != len(self.choices) or FULL in self.choices:
            raise PolicyError(
                f"choices {' '.join(map(str, self.choices))}: expected at least one, each once; {FULL} is the reference"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"choices": [choice.to_json() for choice in self.choices]}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> "SweepSettings":
        return SweepSettings(**{**raw, "choices": tuple(map(Choice.from_json, raw["choices"]))})


@dataclass(frozen=True)
class UnitLosses:
    """One layer's record. Arrays are float64 with axes [choices, states] and, for the first two, [.., boundaries].

    mass, attribution: Delta^mass and Delta^attr of Eqs. (6), (7). action_error: QVLA Eq. (4) per state, squared
    distance of the teacher-forced action from the reference in normalised units ([-1, 1] per dimension).
    likelihood: J of Eq. (2) minus its full-precision value; in nats where J is a mean log-probability.
    """

    unit: str
    choices: tuple[Choice, ...]
    samples: tuple[int, ...]
    mass: np.ndarray
    attribution: np.ndarray
    action_error: np.ndarray
    likelihood: np.ndarray


@dataclass(frozen=True)
class _FullPrecision:
    trunk: Trunk
    profiles: dict[str, Profile]
    objective: Tensor


class Sweep:
    """Evaluates layers of one policy on one calibration set.

    The last batch's full-precision pass is kept for the next layer: whoever takes all layers of a batch before the
    next batch pays for it once. Memory beyond the policy's weights is that pass and one that differs from it,
    whatever the number of layers and states.
    """

    def __init__(self, policy: Policy, states: States, ref: Reference, settings: SweepSettings) -> None:
        self.policy = policy
        self.states = states
        self.reference = ref
        self.settings = settings
        self.chain = policy.chain(settings.language_block)
        self.units = {unit.name: unit for unit in live_units(policy)}
        device = next(policy.parameters()).device
        self.means = {name: torch.from_numpy(mean).to(device) for name, mean in ref.means.items()}
        self._last: tuple[tuple[int, ...], _FullPrecision] | None = None

    def evaluate(self, unit: str, choices: tuple[Choice, ...], samples: tuple[int, ...]) -> UnitLosses:
        """The record of layer `unit` in each of `choices` on the given states.

        Raises DataError when evidence is not finite, naming unit, choice, state and boundary.
        """
        position = {sample: index for index, sample in enumerate(samples)}
        mass = np.zeros((len(choices), len(samples), len(BOUNDARIES)))
        attribution = np.zeros_like(mass)
        action_error = np.zeros(mass.shape[:2])
        likelihood = np.zeros_like(action_error)
        for batch_samples in self.states.split(samples):
            full = self._full_precision(batch_samples)
            columns = [position[sample] for sample in batch_samples]
            for row, choice in enumerate(choices):
                with quantized(self.policy, unit, choice):
                    changed = signals(full.trunk, self.units[unit].segment)
                for column, name in enumerate(BOUNDARIES):
                    now = profile(self.evidence(changed, name), self.settings.epsilon)
                    before = full.profiles[name]
                    mass[row, columns, column] = mass_distortion(before, now, self.settings.epsilon).cpu()
                    attribution[row, columns, column] = jensen_shannon(before.attribution, now.attribution).cpu()
                batch = full.trunk.batch
                action_error[row, columns] = batch.decisions.error(changed.output, batch.decided).cpu()
                likelihood[row, columns] = (changed.objective - full.objective).cpu()
        check_finite(mass + attribution, unit, choices, samples, BOUNDARIES)
        return UnitLosses(unit, choices, samples, mass, attribution, action_error, likelihood)

    def evidence(self, measured: Signals, boundary: str) -> Tensor:
        """E of Eq. (4) at one boundary, float32 [B, tokens, channels]."""
        return evidence_map(measured.hidden[boundary], self.means[boundary], measured.gradients[boundary])

    def full_precision(self, samples: tuple[int, ...]) -> tuple[Trunk, Signals]:
        """The reference pass of states with equal shapes, and its signals."""
        trunk = Trunk(self.chain, self.states.batch(self.policy, samples, self.reference.decided))
        return trunk, trunk.signals()

    def _full_precision(self, samples: tuple[int, ...]) -> _FullPrecision:
        if self._last is None or self._last[0] != samples:
            self._last = None  # freed first: otherwise there were two at the peak
            trunk, measured = self.full_precision(samples)
            profiles = {name: profile(self.evidence(measured, name), self.settings.epsilon) for name in BOUNDARIES}
            self._last = samples, _FullPrecision(trunk, profiles, measured.objective)
        return self._last[1]


@dataclass(frozen=True)
class SweepSpec:
    """Everything that makes a sweep, as paths and values: what a worker process needs to build its own."""

    policy: str
    calibration: str
    settings: SweepSettings
    batch_size: int = 16
    device: str = "cpu"

    def arithmetic(self) -> AbstractContextManager[None]:
        """The block that every pass of this sweep runs in."""
        return float32_products(_DTYPES[self.settings.dtype])

    def load_policy(self) -> Policy:
        """Raises PolicyError for unknown statistics before any weight is read, and as the loader."""
        PolicyConfig.load(self.policy).unnorm_key(self.settings.unnorm_key)
        return load_policy(self.policy, device=self.device, matrices=_DTYPES[self.settings.dtype])

    def load_states(self, policy: Policy) -> States:
        calibration = load_calibration(self.calibration)
        return States(calibration, policy.config, self.policy, self.settings.unnorm_key, self.batch_size)

    def open(self, ref: Reference | None = None) -> Sweep:
        """Loads policy and states; the reference is computed unless it is given."""
        policy = self.load_policy()
        states = self.load_states(policy)
        if ref is None:
            ref = reference(policy, states, policy.chain(self.settings.language_block))
        return Sweep(policy, states, ref, self.settings)
