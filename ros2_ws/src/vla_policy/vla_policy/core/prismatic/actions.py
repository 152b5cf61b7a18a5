"""From what a policy decides to actions: OpenVLA's tokens and OpenVLA-OFT's chunks of normalised values.

Tokens: 256 edges on [-1, 1], 255 bin centres. Both are un-normalised by what the statistics say -1 and 1 stand for.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vla_policy.core.errors import DataError
from vla_policy.core.observation import finite
from vla_policy.core.policy_config import SPAN_EPSILON, ActionStats
from vla_policy.core.prismatic.config import PrismaticConfig

LOGITS = "logits of the action tokens"


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
    def of(config: PrismaticConfig, unnorm_key: str | None = None) -> "ActionCodec":
        return ActionCodec(config.stats(unnorm_key).action, config.token_vocab, config.n_action_bins)

    @property
    def dim(self) -> int:
        """Number of action tokens K: one per dimension."""
        return self.stats.dim

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

    def choose(self, logits: np.ndarray) -> int:
        """The greedy id of one position's logits of the action tokens, [bins]. Raises EngineError unless finite."""
        return self.first_token + int(np.argmax(finite(logits, LOGITS)))

    def tokens_to_normalised(self, tokens: np.ndarray) -> np.ndarray:
        """float64 in [-1, 1], same shape; an id outside the action range falls into the nearest bin."""
        return self.centres[np.clip(self.token_vocab - np.asarray(tokens) - 1, 0, self.bins - 2)]

    def tokens_to_action(self, tokens: np.ndarray) -> np.ndarray:
        """float64 [..., K]: 0.5 (x + 1)(high - low) + low where the mask is set, x elsewhere."""
        values = self.tokens_to_normalised(tokens)
        low, high = np.asarray(self.stats.low), np.asarray(self.stats.high)
        return np.where(self.stats.mask, 0.5 * (values + 1) * (high - low) + low, values)

    def action_to_tokens(self, action: np.ndarray) -> np.ndarray:
        """int64 [..., K]: the inverse of `tokens_to_action` up to a bin. Raises DataError unless finite."""
        action = np.asarray(action, np.float64)
        if action.shape[-1] != self.dim or not np.isfinite(action).all():
            raise DataError(f"action: expected {self.dim} finite values, got {action.tolist()}")
        low, high = np.asarray(self.stats.low), np.asarray(self.stats.high)
        span = np.where(high > low, high - low, 1.0)
        values = np.where(self.stats.mask, 2 * (action - low) / span - 1, action)
        return value_to_tokens(values, self.token_vocab, self.bins)


@dataclass(frozen=True)
class ChunkCodec:
    """Normalised values of an action chunk to actions, for one policy and one set of statistics."""

    stats: ActionStats
    chunk: int

    @property
    def size(self) -> int:
        """H K: values of one decision."""
        return self.chunk * self.stats.dim

    @cached_property
    def span(self) -> np.ndarray:
        """float64 [K]: what the normalised 2 is in the action's unit; 2 where values are used as they are."""
        low, high = np.asarray(self.stats.low), np.asarray(self.stats.high)
        return np.where(self.stats.mask, high - low + SPAN_EPSILON, 2.0)

    @cached_property
    def low(self) -> np.ndarray:
        """float64 [K]: what the normalised -1 is; -1 where values are used as they are."""
        return np.where(self.stats.mask, self.stats.low, -1.0)

    def to_actions(self, values: np.ndarray) -> np.ndarray:
        """float64 [H, K] of the H K normalised `values`. Raises EngineError unless they are finite."""
        rows = finite(np.asarray(values, np.float64), "normalised actions").reshape(self.chunk, -1)
        return np.where(self.stats.mask, 0.5 * (rows + 1) * self.span + self.low, rows)
