"""What a policy's output means as a decision: how firmly it is held, how far another one is, and its action.

OpenVLA answers with logits over action tokens, OpenVLA-OFT with a chunk of continuous actions. Everything that differs
between the two in measuring sensitivity is here.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vla_policy.core.actions import ActionCodec, ChunkCodec
from vla_policy.core.errors import PolicyError
from vla_policy.core.observation import Decision
from vla_policy.core.policy_config import PolicyConfig

_GRIPPER_THRESHOLD = 0.5


class Decisions(Protocol):
    """One policy's decisions under one set of statistics. D values make a decision; `decided` is [B, D]."""

    @property
    def size(self) -> int:
        """D: action tokens, or actions times dimensions."""
        ...

    def objective(self, output: Tensor, decided: Tensor) -> Tensor:
        """J of Mix-QVLA Eq. (2), float32 [B]: how firmly `output` holds to what was decided."""
        ...

    def expected(self, output: Tensor) -> Tensor:
        """float32 [B, D]: the normalised action ([-1, 1] per dimension), differentiable."""
        ...

    def error(self, output: Tensor, decided: Tensor) -> Tensor:
        """QVLA Eq. (4) per state, float64 [B]: squared distance of the actions in normalised units."""
        ...

    def decision(self, decided: np.ndarray) -> Decision:
        """What [D] means for the robot."""
        ...


def mean_log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """J of Eq. (2), float32 [B], from the K positions' logits [B, K, vocab]."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).mean(-1)


@dataclass(frozen=True)
class TokenDecisions:
    """OpenVLA: `output` is logits [B, K, vocab], `decided` int64 tokens [B, K]."""

    codec: ActionCodec

    @property
    def size(self) -> int:
        return self.codec.dim

    def objective(self, output: Tensor, decided: Tensor) -> Tensor:
        return mean_log_likelihood(output, decided)

    def expected(self, output: Tensor) -> Tensor:
        """The mean under the distribution over action bins."""
        return self._bins(output).float().softmax(-1) @ self._values(output).float()

    def error(self, output: Tensor, decided: Tensor) -> Tensor:
        values = self._values(output)
        return (values[self._bins(output).argmax(-1)] - values[decided - self.codec.first_token]).square().sum(-1)

    def decision(self, decided: np.ndarray) -> Decision:
        return Decision(decided, self.codec.tokens_to_action(decided))

    def _bins(self, output: Tensor) -> Tensor:
        return output[..., self.codec.first_token : self.codec.last_token + 1]

    def _values(self, output: Tensor) -> Tensor:
        ids = np.arange(self.codec.first_token, self.codec.last_token + 1)
        return torch.from_numpy(self.codec.tokens_to_normalised(ids)).to(output.device)


@dataclass(frozen=True)
class ChunkDecisions:
    """OpenVLA-OFT: `output` and `decided` are normalised actions, float32 [B, H K], of H control steps.

    mean, deviation: float64 [K], of the training actions in normalised units; a gripper command that is not normalised
    has the threshold between its two meanings in place of its mean.
    """

    codec: ChunkCodec
    mean: np.ndarray
    deviation: np.ndarray

    @staticmethod
    def of(config: PolicyConfig, unnorm_key: str | None) -> "ChunkDecisions":
        """Raises PolicyError when the statistics lack what the objective needs."""
        stats = config.stats(unnorm_key).action
        if stats.mean is None or stats.std is None:
            key = config.unnorm_key(unnorm_key)
            raise PolicyError(f"norm_stats.{key}.action: mean and std are missing; OpenVLA-OFT's objective needs them")
        codec = ChunkCodec(stats, config.chunk or 1)
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

    def decision(self, decided: np.ndarray) -> Decision:
        """Actions [H, K]; there are no tokens."""
        return Decision(np.zeros(0, np.int64), self.codec.to_actions(decided))


def decisions_of(config: PolicyConfig, unnorm_key: str | None) -> Decisions:
    """The form of decision that the policy takes. Raises PolicyError for statistics that do not suffice."""
    if config.chunk is None:
        return TokenDecisions(ActionCodec.of(config, unnorm_key))
    return ChunkDecisions.of(config, unnorm_key)
