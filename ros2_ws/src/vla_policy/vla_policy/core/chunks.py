"""Action chunks to one action per control step.

A chunk is a plan of `horizon` rows from one observation. Where it is taken up is counted, not estimated: as many of its
rows are past as control steps were carried out since its observation. An inference that takes longer than a chunk lasts
leaves the robot still, and a step that was held uses up no row.

Three ways to pass from one chunk to the next:

- `latest`: the newest chunk replaces the older one;
- `ensemble`: temporal ensembling (ACT, arXiv:2304.13705): the rows that all chunks hold for this step are averaged with
  weights exp(-m i), i = 0 for the oldest chunk;
- `soft_mask`: the rows that were carried out while the policy was thinking stay as planned, later rows pass smoothly
  from the old chunk to the new one, with the weights of real-time chunking (arXiv:2506.07339, Eq. 5). It also guides
  the generation of the new chunk towards the old one, which needs a flow or diffusion policy; a policy of action tokens
  offers no such guidance, so here the two are mixed after the decision.

A single held action is no plan over time: it begins with the step after it was decided.
"""

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from vla_policy.core.errors import DataError

BLENDING = ("latest", "ensemble", "soft_mask")
_MAX_CHUNKS = 32
_MAX_STEPS = 1 << 14
"""Carried-out steps that are remembered: five minutes at 50 Hz, longer than any observation's age."""


@dataclass(frozen=True)
class Chunk:
    """`rows`: float64 [steps, K], one row per control step, in the policy's units. `held`: of a single action."""

    observed_ns: int
    rows: np.ndarray
    held: bool

    @staticmethod
    def of(observed_ns: int, actions: np.ndarray, steps_per_action: int, most: int | None = None) -> "Chunk":
        """From `actions` [horizon, K] or [K], each held for `steps_per_action` control steps; the first `most` of them,
        None for all."""
        rows = np.atleast_2d(np.asarray(actions, np.float64))
        if rows.ndim != 2 or not rows.size:
            raise DataError(f"chunk: expected actions of shape [horizon, K], got {list(np.shape(actions))}")
        return Chunk(observed_ns, np.repeat(rows[:most], steps_per_action, axis=0), len(rows) == 1)


@dataclass(frozen=True)
class _Placed:
    """A chunk whose row 0 belongs to the control step `first`, counted over all that were carried out."""

    first: int
    chunk: Chunk


class ChunkExecutor:
    """Holds the current chunks and gives the action that is due. Not thread-safe: its owner locks.

    `period_ns`: control period. `grace_ns`: how long the last row is held after a chunk's end, for the jitter between
    two decisions. `deadline_ns`: how old an observation may be when it is decided. `discrete`: columns that are choices
    (a gripper) and follow the newest chunk unblended.
    """

    def __init__(
        self,
        period_ns: int,
        grace_ns: int,
        deadline_ns: int,
        discrete: tuple[int, ...],
        blending: str = "latest",
        decay: float = 0.1,
    ) -> None:
        if blending not in BLENDING:
            raise DataError(f"chunk blending: expected one of {', '.join(BLENDING)}, got {blending!r}")
        self._period_ns, self._grace_ns, self._deadline_ns = period_ns, grace_ns, deadline_ns
        self._discrete = list(discrete)
        self._blending = blending
        self._decay = decay
        self._chunks: deque[_Placed] = deque(maxlen=_MAX_CHUNKS if blending == "ensemble" else 1)
        self._steps: deque[int] = deque(maxlen=_MAX_STEPS)
        self._count = 0

    def clear(self) -> None:
        """Forgets every plan: a new task, a stop, a clock that was set back."""
        self._chunks.clear()

    def submit(self, chunk: Chunk) -> None:
        """Takes a new chunk; one that is older than the newest held is ignored."""
        if self._chunks and chunk.observed_ns < self._chunks[-1].chunk.observed_ns:
            return
        placed = _Placed(self._count if chunk.held else self._count - self._since(chunk.observed_ns), chunk)
        if self._count - placed.first >= len(chunk.rows):
            return  # carried out by the older plan, all of it: nothing is left to say
        if self._blending == "soft_mask" and self._chunks:
            placed = self._joined(self._chunks[-1], placed)
        self._chunks.append(placed)

    def carried_out(self, now_ns: int) -> None:
        """One control step moved the robot, by what `action` gave or by its limited form."""
        if self._steps and now_ns < self._steps[-1]:
            self._steps.clear()  # a clock that was set back
        self._steps.append(now_ns)
        self._count += 1

    def action(self, now_ns: int) -> np.ndarray | None:
        """float64 [K] for the control step at `now_ns`; None when no plan covers it."""
        due = [(placed.chunk, index) for placed in self._chunks if (index := self._index(placed, now_ns)) is not None]
        if not due:
            return None
        newest = due[-1][0].rows[due[-1][1]]
        if self._blending != "ensemble" or len(due) == 1:
            return newest
        weights = np.exp(-self._decay * np.arange(len(due)))
        blended = np.average([chunk.rows[index] for chunk, index in due], axis=0, weights=weights)
        blended[self._discrete] = newest[self._discrete]
        return blended

    def _since(self, stamp_ns: int) -> int:
        """Control steps that were carried out after `stamp_ns`."""
        return len(self._steps) - bisect_right(self._steps, stamp_ns)

    def _index(self, placed: _Placed, now_ns: int) -> int | None:
        rows = len(placed.chunk.rows)
        if now_ns - placed.chunk.observed_ns > self._deadline_ns + rows * self._period_ns + self._grace_ns:
            return None  # the control loop stood still: what was seen then is not what is there now
        index, last = self._count - placed.first, rows - 1
        if index <= last:
            return index
        carried_out_ns = self._steps[last - index]  # from the end: when the last row was due
        # Half a period for a timer that fires early or late: a step too many would be one that nobody planned.
        return last if now_ns - carried_out_ns < self._grace_ns + self._period_ns // 2 else None

    def _joined(self, old: _Placed, new: _Placed) -> _Placed:
        """The new chunk with real-time chunking's soft mask towards the old one's remaining rows."""
        shift = new.first - old.first
        before, after = old.chunk.rows, new.chunk.rows
        shared = min(len(before) - shift, len(after))
        if shared <= 0 or shift < 0:
            return new
        frozen = min(self._count - new.first, shared)
        progress = (shared - np.arange(shared)) / (shared - frozen + 1)
        weights = np.where(np.arange(shared) < frozen, 1.0, progress * np.expm1(progress) / np.expm1(1.0))
        rows = after.copy()
        rows[:shared] = weights[:, None] * before[shift : shift + shared] + (1 - weights[:, None]) * after[:shared]
        rows[:, self._discrete] = after[:, self._discrete]
        return _Placed(new.first, replace(new.chunk, rows=rows))
