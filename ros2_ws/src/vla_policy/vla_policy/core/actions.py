"""Action tokens: 256 edges on [-1, 1], 255 bin centres, percentile un-normalisation (OpenVLA's action tokenizer)."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vla_policy.core.errors import DataError
from vla_policy.core.policy_config import ActionStats, PolicyConfig


def value_to_tokens(values: np.ndarray, token_vocab: int, bins: int) -> np.ndarray:
    """int64 ids of the bins that hold `values` in [-1, 1]; bin 1 is the vocabulary's last id, counting down."""
    edges = np.linspace(-1.0, 1.0, bins)
    return (token_vocab - np.digitize(np.clip(values, -1.0, 1.0), edges)).astype(np.int64)


@dataclass(frozen=True)
class ActionCodec:
    """Action vectors to token ids and back, for one policy and one set of statistics."""

    stats: ActionStats
    token_vocab: int
    bins: int

    @staticmethod
    def of(config: PolicyConfig, unnorm_key: str | None = None) -> "ActionCodec":
        return ActionCodec(config.stats(unnorm_key).action, config.token_vocab, config.n_action_bins)

    @property
    def dim(self) -> int:
        """Number of action tokens K: one per dimension."""
        return len(self.stats.q01)

    @property
    def first_token(self) -> int:
        return self.token_vocab - self.bins

    @property
    def last_token(self) -> int:
        return self.token_vocab - 1

    @cached_property
    def centres(self) -> np.ndarray:
        """float64 [bins - 1]: what the bins stand for, in [-1, 1]."""
        edges = np.linspace(-1.0, 1.0, self.bins)
        return (edges[:-1] + edges[1:]) / 2

    def tokens_to_normalised(self, tokens: np.ndarray) -> np.ndarray:
        """float64 in [-1, 1], same shape; an id outside the action range falls into the nearest bin."""
        return self.centres[np.clip(self.token_vocab - np.asarray(tokens) - 1, 0, self.bins - 2)]

    def tokens_to_action(self, tokens: np.ndarray) -> np.ndarray:
        """float64 [..., K]: 0.5 (x + 1)(q99 - q01) + q01 where the mask is set, x elsewhere."""
        values = self.tokens_to_normalised(tokens)
        q01, q99 = np.asarray(self.stats.q01), np.asarray(self.stats.q99)
        return np.where(self.stats.mask, 0.5 * (values + 1) * (q99 - q01) + q01, values)

    def action_to_tokens(self, action: np.ndarray) -> np.ndarray:
        """int64 [..., K]: the inverse of `tokens_to_action` up to a bin. Raises DataError unless finite."""
        action = np.asarray(action, np.float64)
        if action.shape[-1] != self.dim or not np.isfinite(action).all():
            raise DataError(f"action: expected {self.dim} finite values, got {action.tolist()}")
        q01, q99 = np.asarray(self.stats.q01), np.asarray(self.stats.q99)
        span = np.where(q99 > q01, q99 - q01, 1.0)
        values = np.where(self.stats.mask, 2 * (action - q01) / span - 1, action)
        return value_to_tokens(values, self.token_vocab, self.bins)
