"""Action chunks to one action per control step.

A chunk is a plan of `horizon` rows from one observation. Three ways to pass from one chunk to the next:

- `latest`: the newest chunk replaces the older one;
- `ensemble`: temporal ensembling (ACT, arXiv:2304.13705): the rows that all chunks hold for this instant are averaged
  with weights exp(-m i), i = 0 for the oldest chunk;
- `soft_mask`: the rows that were due while the policy was thinking stay as planned, later rows pass smoothly from the
  old chunk to the new one, with the weights of real-time chunking (arXiv:2506.07339, Eq. 5). Real-time chunking itself
  also guides the generation of the new chunk towards the old one, which needs a flow or diffusion policy; a policy of
  action tokens offers no such guidance, so here the two are mixed after the decision.

A chunk of several rows is aligned to its observation's stamp: rows whose time went by during inference are skipped. A
single held action has no time of its own and starts when it was decided.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from vla_policy.core.errors import DataError

BLENDING = ("latest", "ensemble", "soft_mask")
_MAX_CHUNKS = 32


@dataclass(frozen=True)
class Chunk:
    """`rows`: float64 [steps, K], one row per control step, in the policy's units."""

    observed_ns: int
    decided_ns: int
    rows: np.ndarray

    @staticmethod
    def of(observed_ns: int, decided_ns: int, actions: np.ndarray, steps_per_action: int) -> "Chunk":
        """From `actions` [horizon, K] or [K], each held for `steps_per_action` control steps."""
        rows = np.atleast_2d(np.asarray(actions, np.float64))
        if rows.ndim != 2 or not rows.size:
            raise DataError(f"chunk: expected actions of shape [horizon, K], got {list(np.shape(actions))}")
        start_ns = decided_ns if len(rows) == 1 else observed_ns
        return Chunk(start_ns, decided_ns, np.repeat(rows, steps_per_action, axis=0))


class ChunkExecutor:
    """Holds the current chunks and gives the action that is due. Not thread-safe: its owner locks.

    `period_ns`: control period. `grace_ns`: how long the last row is held after a chunk's end, for the jitter between
    two decisions. `discrete`: columns that are choices (a gripper) and follow the newest chunk unblended.
    """

    def __init__(
        self, period_ns: int, grace_ns: int, discrete: tuple[int, ...], blending: str = "latest", decay: float = 0.1
    ) -> None:
        if blending not in BLENDING:
            raise DataError(f"chunk blending: expected one of {', '.join(BLENDING)}, got {blending!r}")
        self._period_ns = period_ns
        self._grace_ns = grace_ns
        self._discrete = list(discrete)
        self._blending = blending
        self._decay = decay
        self._chunks: deque[Chunk] = deque(maxlen=_MAX_CHUNKS if blending == "ensemble" else 1)

    def clear(self) -> None:
        """Forgets every plan: a new task, a stop, a clock that was set back."""
        self._chunks.clear()

    def submit(self, chunk: Chunk) -> None:
        """Takes a new chunk; one that is older than the newest held is ignored."""
        if self._chunks and chunk.observed_ns < self._chunks[-1].observed_ns:
            return
        if self._blending == "soft_mask" and self._chunks:
            chunk = self._joined(self._chunks[-1], chunk)
        self._chunks.append(chunk)

    def action(self, now_ns: int) -> np.ndarray | None:
        """float64 [K] that is due at `now_ns`; None when no plan covers this instant."""
        due = [(chunk, index) for chunk in self._chunks if (index := self._index(chunk, now_ns)) is not None]
        if not due:
            return None
        newest = due[-1][0].rows[due[-1][1]]
        if self._blending != "ensemble" or len(due) == 1:
            return newest
        weights = np.exp(-self._decay * np.arange(len(due)))
        blended = np.average([chunk.rows[index] for chunk, index in due], axis=0, weights=weights)
        blended[self._discrete] = newest[self._discrete]
        return blended

    def _index(self, chunk: Chunk, now_ns: int) -> int | None:
        elapsed_ns = now_ns - chunk.observed_ns
        if elapsed_ns < 0 or elapsed_ns >= len(chunk.rows) * self._period_ns + self._grace_ns:
            return None
        return min(elapsed_ns // self._period_ns, len(chunk.rows) - 1)

    def _joined(self, old: Chunk, new: Chunk) -> Chunk:
        """The new chunk with real-time chunking's soft mask towards the old one's remaining rows."""
        shift = (new.observed_ns - old.observed_ns) // self._period_ns
        shared = min(len(old.rows) - shift, len(new.rows))
        if shared <= 0:
            return new
        frozen = min(max(0, math.ceil((new.decided_ns - new.observed_ns) / self._period_ns)), shared)
        progress = (shared - np.arange(shared)) / (shared - frozen + 1)
        weights = np.where(np.arange(shared) < frozen, 1.0, progress * np.expm1(progress) / np.expm1(1.0))
        rows = new.rows.copy()
        rows[:shared] = weights[:, None] * old.rows[shift : shift + shared] + (1 - weights[:, None]) * new.rows[:shared]
        rows[:, self._discrete] = new.rows[:, self._discrete]
        return Chunk(new.observed_ns, new.decided_ns, rows)
