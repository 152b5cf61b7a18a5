"""QVLA's allocation: a width for every output channel of a policy under one budget of bits (Eq. (7)).

Beside the published greedy demotion (Algorithm 1) stands the certified optimum of the same problem. It is separable but
for its one budget, so that Lagrange's multiplier of the budget bounds it to less than one step of one channel; every
option that is worse by more than that bound's gap cannot be in a better solution, and the few channels that are left
open are solved exactly.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from calibrator.allocation.options import Budget, Group, Option
from calibrator.allocation.solve import solve
from vla_policy.core.errors import BudgetError
from vla_policy.core.formats import FULL

_HALVINGS = 200
_CLOSE = 1e-6
"""Where the bound leaves no more than this part of the score, nothing is solved exactly: many channels have bounds
closer than that, and then there are too many open ones."""


@dataclass(frozen=True)
class Channels:
    """What is chosen from. bits: int [W], most first. scores: float64 [N, W], what each width does; the last is inf
    for a channel that may not have it. sizes: int [N], the weights of a channel, or 1 where every one counts the same.
    """

    bits: np.ndarray
    scores: np.ndarray
    sizes: np.ndarray

    @property
    def costs(self) -> np.ndarray:
        """Bits, int64 [N, W]."""
        return self.sizes[:, None].astype(np.int64) * self.bits

    def limit(self, average_bits: float) -> float:
        """The budget in bits, rounded down to what widths can add up to. Raises BudgetError for one that none meet."""
        weights, step = float(self.sizes.sum()), int(np.gcd.reduce(self.costs, axis=None))
        limit = float(math.floor(average_bits * weights / step + 1e-9) * step)
        least = float(np.where(np.isfinite(self.scores), self.costs, np.inf).min(1).sum())
        if limit < least:
            low, high = least / weights, int(self.bits.max())
            raise BudgetError(f"average bits {average_bits:g} are below the least; feasible: {low:.4g} to {high}")
        return limit

    def total(self, picks: np.ndarray) -> float:
        """The score of one width per channel."""
        return float(_picked(self.scores, picks).sum())

    def used(self, picks: np.ndarray) -> int:
        """Its bits."""
        return int(_picked(self.costs, picks).sum())


def _picked(values: np.ndarray, picks: np.ndarray) -> np.ndarray:
    return values[np.arange(len(picks)), picks]


def greedy(channels: Channels, average_bits: float) -> np.ndarray:
    """Algorithm 1, int [N] of columns: from the widest down, to the adjacent width only, the step with the least loss
    per saved bit (Eq. (8)) first, until the budget is met.

    A channel's bits count as often as its size says; with sizes of 1 this is as published. Not done as published, for
    want of its numbers: the thresholds that regularise the step to 0 bits.
    """
    limit, bits, costs = channels.limit(average_bits), channels.bits, channels.costs
    loss = np.diff(channels.scores, axis=1) / -np.diff(costs, axis=1)  # of the step from a width to the next
    picks = np.zeros(len(costs), np.int64)
    heap = [(float(ratio), channel, 0) for channel, ratio in enumerate(loss[:, 0])]
    heapq.heapify(heap)
    used = channels.used(picks)
    while used > limit and heap:
        _, channel, step = heapq.heappop(heap)
        picks[channel] = step + 1
        used -= int(costs[channel, step] - costs[channel, step + 1])
        if step + 2 < len(bits) and loss[channel, step + 1] < math.inf:
            heapq.heappush(heap, (float(loss[channel, step + 1]), channel, step + 1))
    return picks


def optimum(channels: Channels, average_bits: float) -> tuple[np.ndarray, float]:
    """The best widths, int [N] of columns, and a proven lower bound of any score within the budget; the two differ by
    less than a millionth."""
    limit, costs, scores = channels.limit(average_bits), channels.costs, channels.scores
    unconstrained = scores.argmin(1)  # of equal scores the widest
    if channels.used(unconstrained) <= limit:
        return unconstrained, channels.total(unconstrained)
    price, feasible = _price(channels, limit)
    priced = scores + price * costs
    least = priced.min(1)
    bound = float(least.sum()) - price * limit
    best = min((_filled(channels, feasible, limit), greedy(channels, average_bits)), key=channels.total)
    room = max(0.0, channels.total(best) - bound) * (1 + 1e-9)
    if room <= _CLOSE * bound:
        return best, min(bound, channels.total(best))
    # What a better solution may hold: options that cost no more than what the bound leaves.
    open_options = priced - least[:, None] <= room
    fixed = open_options.sum(1) == 1
    picks = np.where(fixed, open_options.argmax(1), best)
    rest = np.flatnonzero(~fixed)
    if len(rest):
        groups = [_group(channels, int(channel), open_options[channel]) for channel in rest]
        left = limit - float(_picked(costs, picks)[fixed].sum())
        solution = solve(groups, [Budget("code_bits", left, "bits of the open channels")])
        for channel, group, option in zip(rest, groups, solution.options, strict=True):
            picks[channel] = np.flatnonzero(open_options[channel])[group.options.index(option)]
        bound = max(bound, float(_picked(scores, picks)[fixed].sum()) + solution.bound)
    return picks, min(bound, channels.total(picks))


def _price(channels: Channels, limit: float) -> tuple[float, np.ndarray]:
    """The multiplier of the budget, score per bit, at which the priced optimum just meets it; and that optimum."""

    def at(price: float) -> np.ndarray:
        return (channels.scores + price * channels.costs).argmin(1)

    low, high = 0.0, 1.0
    while channels.used(at(high)) > limit:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if channels.used(at(middle)) <= limit else (middle, high)
    return high, at(high)


def _filled(channels: Channels, picks: np.ndarray, limit: float) -> np.ndarray:
    """The picks, of which some are widened while there is room, what gains most per bit first."""
    costs, scores = channels.costs, channels.scores
    more = costs - _picked(costs, picks)[:, None]
    gain = _picked(scores, picks)[:, None] - scores
    useful = (more > 0) & (gain > 0)
    order = np.argsort(-(gain[useful] / more[useful]), kind="stable")
    filled, left, raised = picks.copy(), limit - channels.used(picks), set()
    for channel, column in np.argwhere(useful)[order]:
        if channel not in raised and more[channel, column] <= left:
            filled[channel], left = column, left - more[channel, column]
            raised.add(channel)
    return filled


def _group(channels: Channels, channel: int, options: np.ndarray) -> Group:
    """A channel for the solver of layers, with the options that are open. The choice says nothing here."""
    columns = np.flatnonzero(options)
    costs, scores = channels.costs[channel], channels.scores[channel]
    found = tuple(Option(FULL, float(scores[one]), int(costs[one]), 0, 0, 0.0) for one in columns)
    return Group(f"channel {channel}", (), found)
