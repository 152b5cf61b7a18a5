"""What one layer's low precision does to the policy: losses per choice and state, Mix-QVLA Eqs. (2) to (8)."""

import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrator.codes import KeptCodes
from calibrator.data.calibration import load_calibration
from calibrator.families import Policy, empty_policy, live_units, load_policy
from calibrator.quantizers import Codes, Computed, InputScale, InputScales, quantized
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
from calibrator.sensitivity.floor import reordered
from calibrator.sensitivity.passes import Signals, Trunk, signals
from calibrator.sensitivity.scores import check_finite
from calibrator.sensitivity.states import Reference, States, reference
from vla_policy.core.errors import ArtefactError, DataError, PolicyError
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import FULL, Choice
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.targets import find_target

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SweepSettings:
    """What the numbers depend on.

    choices: what every layer is measured in; full precision is the reference. language_block: decoder block whose input
    is the language boundary, None for the last. epsilon: of Eqs. (6), (7). dtype: how matrices are held; all arithmetic
    is float32. target: the machine whose kernels say how activations are rounded, None for per token.
    """

    choices: tuple[Choice, ...]
    language_block: int | None = None
    epsilon: float = EPSILON
    dtype: str = "float32"
    unnorm_key: str | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise PolicyError(f"epsilon {self.epsilon}: expected a small number above 0, e.g. {EPSILON}")
        if self.target is not None:
            find_target(self.target)
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

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All arrays, in the order of a record's numbers."""
        return self.mass, self.attribution, self.action_error, self.likelihood

    @staticmethod
    def of_numbers(unit: str, choice: Choice, samples: tuple[int, ...], numbers: np.ndarray) -> "UnitLosses":
        """From [states, numbers], each state's `arrays` one after another."""
        deep = len(BOUNDARIES)
        mass, attribution = numbers[None, :, :deep], numbers[None, :, deep : 2 * deep]
        return UnitLosses(unit, (choice,), samples, mass, attribution, numbers[None, :, -2], numbers[None, :, -1])


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

    def __init__(
        self, policy: Policy, states: States, ref: Reference, settings: SweepSettings, codes: Codes | None = None
    ) -> None:
        """codes: computed whenever they are needed, unless somebody has them."""
        self.policy = policy
        self.states = states
        self.reference = ref
        self.settings = settings
        self.codes = codes or Computed()
        self.chain = policy.chain(settings.language_block)
        self.units = {unit.name: unit for unit in live_units(policy)}
        device = next(policy.parameters()).device
        self.means = {name: torch.from_numpy(mean).to(device) for name, mean in ref.means.items()}
        self._scales = InputScales(find_target(settings.target) if settings.target else None, ref.peaks)
        self._last: tuple[tuple[int, ...], _FullPrecision] | None = None

    def evaluate(self, unit: str, choices: tuple[Choice, ...], samples: tuple[int, ...]) -> UnitLosses:
        """The record of layer `unit` in each of `choices` on the given states; see `changed`.

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
                with self.changed(unit, choice):
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

    def changed(self, unit: str, choice: Choice) -> AbstractContextManager[None]:
        """The block in which one layer is in `choice`, as the target's kernel computes it.

        In full precision its sum is taken in another order: what differs then is rounding alone.
        """
        if choice == FULL:
            return reordered(self.policy, unit)
        return quantized(self.policy, unit, choice, self.codes, self.scale(unit, choice))

    def coded(self, unit: str, weight: Tensor, choice: Choice) -> Tensor:
        """A layer's weight [out, ...] as the choice has it, float32.

        Raises PolicyError for one that multiplies a turned input: output channels cannot choose that for themselves.
        """
        if choice.recipe is None:
            return weight
        found = self.codes.of(unit, weight, choice)
        if found.operator is not None:
            raise PolicyError(f"{unit} in {choice}: its input goes through an operator, the same for all channels")
        return found.dequantize()

    def scale(self, unit: str, choice: Choice) -> InputScale:
        """How a layer's input is rounded."""
        return self._scales.of(unit, choice.format)

    def evidence(self, measured: Signals, boundary: str) -> Tensor:
        """E of Eq. (4) at one boundary, float32 [B, tokens, channels]."""
        return evidence_map(measured.hidden[boundary], self.means[boundary], measured.gradients[boundary])

    def full_precision(self, samples: tuple[int, ...]) -> tuple[Trunk, Signals]:
        """The reference pass of the states of one batch, and its signals."""
        trunk = Trunk(self.chain, self.states.batch(self.policy, samples, self.reference.decided))
        return trunk, trunk.signals()

    def _full_precision(self, samples: tuple[int, ...]) -> _FullPrecision:
        """Raises DataError for evidence that is not finite, naming state and boundary."""
        if self._last is None or self._last[0] != samples:
            self._last = None  # freed first: otherwise there were two at the peak
            trunk, measured = self.full_precision(samples)
            profiles = {name: profile(self.evidence(measured, name), self.settings.epsilon) for name in BOUNDARIES}
            for name, found in profiles.items():
                bad = (~(found.mass.isfinite() & found.attribution.isfinite().all(1))).nonzero()
                if len(bad):
                    raise DataError(
                        f"full precision: evidence of sample {samples[int(bad[0])]} at boundary {name!r} is not "
                        "finite, before any layer is quantized; check the checkpoint and the calibration set's images"
                    )
            self._last = samples, _FullPrecision(trunk, profiles, measured.objective)
        return self._last[1]


@dataclass(frozen=True)
class SweepSpec:
    """Everything that makes a sweep, as paths and values: what a worker process needs to build its own.

    codes: a folder of `calibrator.codes`, None where recipes are cheap. sha256: what policy and calibration set must
    be, by their names, None where nobody has looked yet.
    """

    policy: str
    calibration: str
    settings: SweepSettings
    batch_size: int = 16
    device: str = "cpu"
    codes: str | None = None
    sha256: tuple[str, str] | None = None

    @property
    def weight_bits(self) -> tuple[int, ...]:
        """Of every choice."""
        return tuple(choice.format.weight_bits for choice in self.settings.choices)

    def arithmetic(self) -> AbstractContextManager[None]:
        """The block that every pass of this sweep runs in."""
        return float32_products(DTYPES[self.settings.dtype])

    def empty_policy(self) -> Policy:
        """The policy without its weights. Raises PolicyError for unknown statistics and a block that there is not."""
        config = PolicyConfig.load(self.policy)
        config.unnorm_key(self.settings.unnorm_key)
        policy = empty_policy(config)
        policy.chain(self.settings.language_block)
        return policy

    def load_policy(self) -> Policy:
        """Raises as the loader."""
        return load_policy(self.policy, device=self.device, matrices=DTYPES[self.settings.dtype])

    def load_states(self, policy: Policy) -> States:
        calibration = load_calibration(self.calibration)
        return States(calibration, policy, self.policy, self.settings.unnorm_key, self.batch_size)

    def check_inputs(self, calibration_sha256: str) -> None:
        """Raises ArtefactError unless policy and calibration set are those that the sweep is of."""
        if self.sha256 is None:
            return
        found = sha256_policy(self.policy), calibration_sha256
        for path, got, wanted in zip((self.policy, self.calibration), found, self.sha256, strict=True):
            if got != wanted:
                raise ArtefactError(
                    f"{path}: holds {got[:12]} on {platform.node()}, the sweep is of {wanted[:12]}; copy the same "
                    "files to every machine"
                )

    def open(self, ref: Reference | None = None, done: Callable[[int], None] = lambda _: None) -> Sweep:
        """Loads policy and states; the reference is computed unless it is given, and `done` hears of its states."""
        states = self.load_states(self.empty_policy())
        self.check_inputs(states.calibration.sha256)
        policy = self.load_policy()
        if ref is None:
            ref = reference(policy, states, policy.chain(self.settings.language_block), done)
        codes = KeptCodes(Path(self.codes)) if self.codes else None
        return Sweep(policy, states, ref, self.settings, codes)
