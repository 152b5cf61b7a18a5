"""What an action chunk that is integrated from noise means as a decision."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla_policy.core.errors import PolicyError
from vla_policy.core.families.pi05 import scaling_of
from vla_policy.core.flow.config import FlowConfig
from vla_policy.core.flow.statistics import Scaling
from vla_policy.core.observation import Decision


@dataclass(frozen=True)
class FlowDecisions:
    """`output` and `decided` are normalised actions, float32 [B, H K]; the first `executed` of the H rows count.

    mean, deviation: float64 [K], of the training actions in normalised units; a dimension that never varied has an
    infinite deviation, so that the objective asks nothing of it.
    """

    scaling: Scaling
    horizon: int
    executed: int
    mean: np.ndarray
    deviation: np.ndarray

    @staticmethod
    def of(config: FlowConfig, unnorm_key: str | None) -> "FlowDecisions":
        """Raises PolicyError when the statistics lack what the objective needs."""
        stats = config.stats(unnorm_key).action
        key = config.unnorm_key(unnorm_key)
        if stats.mean is None or stats.std is None:
            raise PolicyError(f"norm_stats.{key}.action: mean and std are missing; the objective needs them")
        spread = np.asarray(stats.std)
        if not (spread >= 0).all() or not spread.any():
            raise PolicyError(f"norm_stats.{key}.action: std {list(stats.std)}: expected none below zero, not all zero")
        scaling = scaling_of(stats, config)
        mean = scaling.normalised(np.asarray(stats.mean))
        deviation = np.where(spread > 0, spread / scaling.divisor, np.inf)
        return FlowDecisions(scaling, config.horizon, config.executed, mean, deviation)

    @property
    def size(self) -> int:
        return self.horizon * len(self.mean)

    def objective(self, output: Tensor, decided: Tensor) -> Tensor:
        """<v, a - mean> / <v, a* - mean> with v = (a* - mean) / deviation^2: 1 for the decision itself.

        As for any head that regresses: how far the action goes from the average action in the direction that was
        decided. A flow has a likelihood, but its gradient vanishes nowhere near what was decided from one noise.
        """
        mean, deviation = (
            torch.from_numpy(np.tile(values, self.executed)).to(output.device, torch.float32)
            for values in (self.mean, self.deviation)
        )
        wanted = self.expected(decided) - mean
        direction = wanted / deviation.square()
        return ((self.expected(output) - mean) * direction).sum(-1) / (wanted * direction).sum(-1)

    def expected(self, output: Tensor) -> Tensor:
        """float32 [B, E K]: the rows that are carried out."""
        return output.float()[:, : self.executed * len(self.mean)]

    def error(self, output: Tensor, decided: Tensor) -> Tensor:
        return (self.expected(output).double() - self.expected(decided).double()).square().sum(-1)

    def scores(self, output: Tensor) -> Tensor:
        """The normalised actions, [B, H, K]."""
        return output.unflatten(1, (self.horizon, -1))

    def strays(self, output: Tensor) -> Tensor:
        """Nowhere: there is nothing but actions."""
        return torch.zeros(len(output), dtype=torch.bool)

    def decision(self, decided: np.ndarray) -> Decision:
        """Actions [H, K]; there are no tokens."""
        return Decision(np.zeros(0, np.int64), self.scaling.restored(decided.reshape(self.horizon, -1)))
