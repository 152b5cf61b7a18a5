"""Calibration states as policy inputs, and the full-precision reference that every variant is compared with."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from calibrator.data.calibration import CalibrationSet
from calibrator.families import Inputs, Policy, find_family
from calibrator.modules.chain import PROMPT, Chain
from calibrator.sensitivity.passes import Batch, Trunk
from vla_policy.core.observation import check_strays
from vla_policy.core.policy_config import PolicyConfig


@dataclass(frozen=True)
class Reference:
    """The full-precision decision and statistics, computed once and kept fixed.

    decided: y* of Mix-QVLA Eq. (2), [N, D] in the form of the family's decisions. means: float32 [channels] per
    boundary, Eq. (3). strays: bool [N], the states in which the policy prefers something else than an action.
    """

    decided: np.ndarray
    means: dict[str, np.ndarray]
    strays: np.ndarray


class States:
    """A calibration set as inputs of one policy. Images are preprocessed when a batch is asked for."""

    def __init__(
        self, calibration: CalibrationSet, config: PolicyConfig, folder: Path | str, unnorm_key: str | None, batch: int
    ) -> None:
        self.calibration = calibration
        self.decisions = find_family(config).decisions(config, unnorm_key)
        self.batch_size = batch
        self._robot = config.family.policy(config, Path(folder), unnorm_key)
        self._shapes = [
            {name: values.shape for name, values in self._inputs(sample).items()} for sample in range(len(calibration))
        ]

    def __len__(self) -> int:
        return len(self.calibration)

    @property
    def mean_prompt_tokens(self) -> float:
        """Mean length of the prompts, 0 for a policy that reads none."""
        return float(np.mean([shapes[PROMPT][1] if PROMPT in shapes else 0 for shapes in self._shapes]))

    def split(self, samples: Iterator[int] | range | tuple[int, ...]) -> list[tuple[int, ...]]:
        """Batches of inputs of equal shapes, at most `batch_size` states each, longest prompts first."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for sample in samples:
            alike.setdefault(tuple(sorted(self._shapes[sample].items())), []).append(sample)
        size = self.batch_size
        return [
            tuple(together[start : start + size])
            for _, together in sorted(alike.items(), reverse=True)
            for start in range(0, len(together), size)
        ]

    def inputs(self, policy: Policy, samples: tuple[int, ...]) -> Inputs:
        """States of equal shapes on the policy's device and in its dtype."""
        return policy.tensors([self._inputs(sample) for sample in samples])

    def _inputs(self, sample: int) -> dict[str, np.ndarray]:
        return self._robot.inputs(self.calibration.observation(sample))

    def batch(self, policy: Policy, samples: tuple[int, ...], decided: np.ndarray) -> Batch:
        """The states as one batch; `decided` [N, D] are the reference decisions of all states."""
        return Batch(samples, self.inputs(policy, samples), policy.tensor(decided[list(samples)]), self.decisions)


def reference(policy: Policy, states: States, chain: Chain) -> Reference:
    """y* of Eq. (2) and the mean per channel of Eq. (3), by one greedy decision and one pass per state.

    Raises PolicyError for a policy that decides something else than actions.
    """
    decided: dict[int, np.ndarray] = {}
    strays = np.zeros(len(states), bool)
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    for samples in states.split(range(len(states))):
        inputs = states.inputs(policy, samples)
        chosen = policy.decide(inputs, states.decisions.size)
        decided |= zip(samples, chosen.cpu().numpy(), strict=True)
        trunk = Trunk(chain, Batch(samples, inputs, chosen, states.decisions), differentiable=False)
        strays[list(samples)] = states.decisions.strays(trunk.values[chain.output]).cpu().numpy()
        for name, value in chain.boundaries.items():
            hidden = trunk.values[value].double().flatten(0, 1)
            sums[name] = sums.get(name, 0) + hidden.sum(0)
            counts[name] += len(hidden)
    check_strays(int(strays.sum()), len(states), "calibration set")
    rows = np.stack([decided[index] for index in range(len(states))])
    means = {name: (sums[name] / counts[name]).float().cpu().numpy() for name in chain.boundaries}
    return Reference(rows, means, strays)
