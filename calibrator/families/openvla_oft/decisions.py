"""What a chunk of continuous actions means as a decision."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla_policy.core.errors import PolicyError
from vla_policy.core.families.openvla_oft import OftConfig
from vla_policy.core.observation import Decision
from vla_policy.core.prismatic.actions import ChunkCodec

_GRIPPER_THRESHOLD = 0.5


@dataclass(frozen=True)
class ChunkDecisions:
    """`output` and `decided` are normalised actions, float32 [B, H K], of H control steps.

    mean, deviation: float64 [K], of the training actions in normalised units; a gripper command that is not normalised
    has the threshold between its two meanings in place of its mean.
    """

    codec: ChunkCodec
    mean: np.ndarray
    deviation: np.ndarray

    @staticmethod
    def of(config: OftConfig, unnorm_key: str | None) -> "ChunkDecisions":
        """Raises PolicyError when the statistics lack what the objective needs."""
        stats = config.stats(unnorm_key).action
        if stats.mean is None or stats.std is None:
            key = config.unnorm_key(unnorm_key)
            raise PolicyError(f"norm_stats.{key}.action: mean and std are missing; OpenVLA-OFT's objective needs them")
        codec = ChunkCodec(stats, config.horizon)
        mean = np.where(stats.mask, 2 * (np.asarray(stats.mean) - codec.low) / codec.span - 1, _GRIPPER_THRESHOLD)
        deviation = 2 * np.asarray(stats.std) / codec.span
        if not (deviation > 0).all():
            raise PolicyError(f"norm_stats: the actions' std {list(stats.std)} must be above zero")
        return ChunkDecisions(codec, mean, deviation)

    @property
    def size(self) -> int:
        return self.codec.size

    def objective(self, output: Tensor, decided: Tensor) -> Tensor:
        """<v, a - mean> / <v, a* - mean> with v = (a* - mean) / deviation^2: 1 for the decision itself.

        An L1 head has no likelihood, and any distance from its own decision has no gradient there. This linear form
        has: it asks how far the action goes from the average action in the direction that was decided. For the gripper
        it is the signed margin about the threshold.
        """
        mean, deviation = (
            torch.from_numpy(np.tile(values, self.codec.chunk)).to(output.device, torch.float32)
            for values in (self.mean, self.deviation)
        )
        direction = (decided.float() - mean) / deviation.square()
        held = ((output.float() - mean) * direction).sum(-1)
        return held / ((decided.float() - mean) * direction).sum(-1)

    def expected(self, output: Tensor) -> Tensor:
        return output.float()

    def error(self, output: Tensor, decided: Tensor) -> Tensor:
        return (output.double() - decided.double()).square().sum(-1)

    def scores(self, output: Tensor) -> Tensor:
        """The normalised actions, [B, H, K]."""
        return output.unflatten(1, (self.codec.chunk, -1))

    def strays(self, output: Tensor) -> Tensor:
        """Nowhere: the head gives nothing but actions."""
        return torch.zeros(len(output), dtype=torch.bool)

    def decision(self, decided: np.ndarray) -> Decision:
        """Actions [H, K]; there are no tokens."""
        return Decision(np.zeros(0, np.int64), self.codec.to_actions(decided))
