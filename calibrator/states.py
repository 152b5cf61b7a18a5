"""Calibration states as policy inputs, and the full-precision reference that every variant is compared with."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calibrator.calibration import CalibrationSet
from calibrator.evidence import BOUNDARIES
from calibrator.passes import Batch, Trunk
from calibrator.policy import OpenVLA
from vla_policy.core.actions import ActionCodec
from vla_policy.core.image import pixel_values
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prompt import PromptTokenizer


@dataclass(frozen=True)
class Reference:
    """The full-precision decision and statistics, computed once and kept fixed.

    tokens: int64 [N, K], y* of Mix-QVLA Eq. (2). means: float32 [channels] per boundary, Eq. (3).
    """

    tokens: np.ndarray
    means: dict[str, np.ndarray]


class States:
    """A calibration set tokenised for one policy. Images are preprocessed when a batch is asked for."""

    def __init__(
        self, calibration: CalibrationSet, config: PolicyConfig, folder: Path | str, unnorm_key: str | None, batch: int
    ) -> None:
        tokenizer = PromptTokenizer(folder, config, unnorm_key)
        self.calibration = calibration
        self.config = config
        self.codec = ActionCodec.of(config, unnorm_key)
        self.batch_size = batch
        self.input_ids = [
            tokenizer.encode(calibration.samples[index].instruction, calibration.states[index])
            for index in range(len(calibration))
        ]

    def __len__(self) -> int:
        return len(self.calibration)

    @property
    def mean_prompt_tokens(self) -> float:
        """Mean length of the prompts, patches not counted."""
        return float(np.mean([len(ids) for ids in self.input_ids]))

    def split(self, samples: Iterator[int] | range | tuple[int, ...]) -> list[tuple[int, ...]]:
        """Batches of equal prompt length, at most `batch_size` states each, longest prompts first."""
        by_length: dict[int, list[int]] = {}
        for sample in samples:
            by_length.setdefault(len(self.input_ids[sample]), []).append(sample)
        size = self.batch_size
        return [
            tuple(members[start : start + size])
            for _, members in sorted(by_length.items(), reverse=True)
            for start in range(0, len(members), size)
        ]

    def inputs(self, policy: OpenVLA, samples: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """pixel_values [B, 6 N, S, S] and input_ids [B, L] on the policy's device and in its dtype."""
        weight = policy.projector.fc1.weight
        pixels = np.stack(
            [pixel_values(self.calibration.observation(sample).images, self.config) for sample in samples]
        )
        ids = np.stack([self.input_ids[sample] for sample in samples])
        return torch.from_numpy(pixels).to(weight.device, weight.dtype), torch.from_numpy(ids).to(weight.device)

    def batch(self, policy: OpenVLA, samples: tuple[int, ...], tokens: np.ndarray) -> Batch:
        """The states as one batch; `tokens` int64 [N, K] are the reference decisions of all states."""
        pixels, ids = self.inputs(policy, samples)
        return Batch(samples, pixels, ids, torch.from_numpy(tokens[list(samples)]).to(ids.device))


def reference(policy: OpenVLA, states: States, language_block: int) -> Reference:
    """y* of Eq. (2) and the mean per channel of Eq. (3), by one greedy decision and one pass per state."""
    tokens = np.zeros((len(states), states.codec.dim), np.int64)
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(BOUNDARIES, 0)
    for samples in states.split(range(len(states))):
        pixels, ids = states.inputs(policy, samples)
        chosen = policy.generate(pixels, ids, states.codec.dim)
        tokens[list(samples)] = chosen.cpu().numpy()
        trunk = Trunk(policy, Batch(samples, pixels, ids, chosen), language_block, differentiable=False)
        for name in BOUNDARIES:
            hidden = trunk.run.boundaries[name].double().flatten(0, 1)
            sums[name] = sums.get(name, 0) + hidden.sum(0)
            counts[name] += len(hidden)
    return Reference(tokens, {name: (sums[name] / counts[name]).float().cpu().numpy() for name in BOUNDARIES})
