"""What logits over action tokens mean as a decision."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla_policy.core.observation import Decision
from vla_policy.core.prismatic.actions import ActionCodec
from vla_policy.core.prismatic.config import PrismaticConfig


def mean_log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """J of Eq. (2), float32 [B], from the K positions' logits [B, K, vocab]."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).mean(-1)


@dataclass(frozen=True)
class TokenDecisions:
    """`output` is logits [B, K, vocab], `decided` int64 tokens [B, K]."""

    codec: ActionCodec

    @staticmethod
    def of(config: PrismaticConfig, unnorm_key: str | None) -> "TokenDecisions":
        return TokenDecisions(ActionCodec.of(config, unnorm_key))

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

    def scores(self, output: Tensor) -> Tensor:
        """The action tokens' logits, [B, K, bins]."""
        return self._bins(output)

    def strays(self, output: Tensor) -> Tensor:
        """Where one of the K tokens, chosen freely from the vocabulary, would be no action token."""
        free = output.argmax(-1)
        return ((free < self.codec.first_token) | (free > self.codec.last_token)).any(-1)

    def decision(self, decided: np.ndarray) -> Decision:
        return Decision(decided, self.codec.tokens_to_action(decided))

    def _bins(self, output: Tensor) -> Tensor:
        return output[..., self.codec.first_token : self.codec.last_token + 1]

    def _values(self, output: Tensor) -> Tensor:
        ids = np.arange(self.codec.first_token, self.codec.last_token + 1)
        return torch.from_numpy(self.codec.tokens_to_normalised(ids)).to(output.device)
