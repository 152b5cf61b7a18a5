"""Calibration states as policy inputs, and the full-precision reference that every variant is compared with."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrator.data.calibration import CalibrationSet
from calibrator.data.statistics import watched_peaks
from calibrator.families import Inputs, Policy, find_family, live_units
from calibrator.modules.chain import PROMPT, Chain
from calibrator.sensitivity.passes import Batch, Trunk
from vla_policy.core.errors import DataError
from vla_policy.core.observation import check_strays


@dataclass(frozen=True)
class Reference:
    """The full-precision decision and statistics, computed once and kept fixed.

    decided: y* of Mix-QVLA Eq. (2), [N, D] in the form of the family's decisions. means: float32 [channels] per
    boundary, Eq. (3). strays: bool [N], the states in which the policy prefers something else than an action. peaks: by
    layer, the largest |input| while the policy decides, from which a fixed scale follows. spread: float64 [N], the mean
    squared distance (QVLA Eq. 4) to what other random numbers decide, NaN for a policy without any.
    """

    decided: np.ndarray
    means: dict[str, np.ndarray]
    strays: np.ndarray
    peaks: dict[str, float]
    spread: np.ndarray


class States:
    """A calibration set as inputs of one policy. Images are preprocessed when a batch is asked for."""

    def __init__(
        self, calibration: CalibrationSet, policy: Policy, folder: Path | str, unnorm_key: str | None, batch: int
    ) -> None:
        """policy: its weights are not looked at. batch: the largest number of states per pass."""
        config = policy.config
        self.calibration = calibration
        self._pads_prompts = policy.pads_prompts
        self.decisions = find_family(config).decisions(config, unnorm_key)
        self.batch_size = batch
        self._folder = Path(folder)
        self._robot = config.family.policy(config, Path(folder), unnorm_key)
        self._shapes = [
            {name: values.shape for name, values in self._inputs(sample).items()} for sample in range(len(calibration))
        ]

    def __len__(self) -> int:
        return len(self.calibration)

    @property
    def mean_prompt_tokens(self) -> float:
        """Mean length of the prompts, 0 for a policy that reads none."""
        return float(np.mean([self._prompt_tokens(sample) for sample in range(len(self))]))

    def _prompt_tokens(self, sample: int) -> int:
        return int(self._shapes[sample].get(PROMPT, (1, 0))[1])

    def split(self, samples: Iterable[int], alike: bool = False) -> list[tuple[int, ...]]:
        """Batches of at most `batch_size` states each, longest prompts first. Inputs of one batch have equal shapes, or
        differ in the prompt's length where the policy allows it; not if they have to be `alike`."""
        lengths = {sample: self._prompt_tokens(sample) for sample in samples}
        together: dict[tuple[Any, ...], list[int]] = {}
        for sample in lengths:
            shapes = {**self._shapes[sample]}
            if self._pads_prompts and not alike:
                shapes.pop(PROMPT, None)
            together.setdefault(tuple(sorted(shapes.items())), []).append(sample)
        groups = [sorted(group, key=lambda sample: -lengths[sample]) for group in together.values()]
        groups.sort(key=lambda group: -lengths[group[0]])
        size = self.batch_size
        return [tuple(group[start : start + size]) for group in groups for start in range(0, len(group), size)]

    def inputs(self, policy: Policy, samples: tuple[int, ...]) -> Inputs:
        """States of one batch on the policy's device and in its dtype."""
        return policy.tensors([self._inputs(sample) for sample in samples])

    def redrawn(self, policy: Policy, inputs: Inputs) -> list[Inputs]:
        """See `Policy.redrawn`."""
        return policy.redrawn(inputs, self._folder)

    def _inputs(self, sample: int) -> dict[str, np.ndarray]:
        return self._robot.inputs(self.calibration.observation(sample))

    def batch(self, policy: Policy, samples: tuple[int, ...], decided: np.ndarray) -> Batch:
        """The states as one batch; `decided` [N, D] are the reference decisions of all states."""
        return Batch(samples, self.inputs(policy, samples), policy.tensor(decided[list(samples)]), self.decisions)


def reference(policy: Policy, states: States, chain: Chain, done: Callable[[int], None]) -> Reference:
    """y* of Eq. (2) and the mean per channel of Eq. (3), by one greedy decision and one pass per state.

    done: hears of the number of states that are done. Raises PolicyError for a policy that decides something else than
    actions, DataError for values that are not finite.
    """
    decided: dict[int, np.ndarray] = {}
    strays, spread = np.zeros(len(states), bool), np.full(len(states), np.nan)
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    peaks = {unit.name: 0.0 for unit in live_units(policy)}
    for samples in states.split(range(len(states)), alike=True):
        inputs = states.inputs(policy, samples)
        with watched_peaks(policy, peaks):
            chosen = policy.decide(inputs, states.decisions.size)
        decided |= zip(samples, chosen.cpu().numpy(), strict=True)
        if others := states.redrawn(policy, inputs):
            far = [states.decisions.error(policy.decide(other, states.decisions.size), chosen) for other in others]
            spread[list(samples)] = torch.stack(far).mean(0).cpu().numpy()
        trunk = Trunk(chain, Batch(samples, inputs, chosen, states.decisions), differentiable=False)
        strays[list(samples)] = states.decisions.strays(trunk.values[chain.output]).cpu().numpy()
        for name, value in chain.boundaries.items():
            hidden = trunk.values[value].double().flatten(0, 1)
            if not bool(hidden.isfinite().all()):
                raise DataError(f"full precision: {name!r} of states {samples} is not finite; check the checkpoint")
            sums[name] = sums.get(name, 0) + hidden.sum(0)
            counts[name] += len(hidden)
        done(len(samples))
    check_strays(int(strays.sum()), len(states), "calibration set")
    rows = np.stack([decided[index] for index in range(len(states))])
    means = {name: (sums[name] / counts[name]).float().cpu().numpy() for name in chain.boundaries}
    return Reference(rows, means, strays, peaks, spread)
