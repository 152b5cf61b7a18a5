"""Screened sensitivity: exact evaluation only where it can still change the allocation.

Very few passes predict the loss L of Eq. (9) of every layer, choice and state to first order (`proxy`): P. Of a layer m
in a choice b, evaluated on n states,

    L ~ c P,    y[m, b] = ln (sum of L / sum of P over these states),    Var(y) = s[stage, b] mean(P) / sum of P,

for the relative error of L grows as the loss falls. Layers of one stage are alike, ln c ~ N(level[stage, b],
v[stage, b]), so ln c is taken for what both tell together: y weighed with 1 / Var(y), the level with 1 / v. Evaluated
states are as they are, the others c P; from both follow Omega, Omega_tau and the score of Eq. (14a), with a radius of
`_DEVIATIONS` standard deviations for what is not evaluated.

What is evaluated next is what CLUCB asks for (Chen et al., Combinatorial pure exploration, NeurIPS 2014): the plan that
is best by the scores is compared with the best one when every chosen pair is as bad as its radius allows and every
other as good. Pairs in which the two differ, at any target, are in doubt: they get further states, largest radius
first, until the two agree at every target or the cap on evaluations is reached. States come in one order for all
layers, so that they share passes. No bound on the plan's loss follows from it; `docs/results.md` has what was found on
tables that the constants below were not chosen on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calibrator.sensitivity.scores import temporal_score
from vla_policy.core.errors import BudgetError

_DEVIATIONS = 2.0
_PILOT = 2
_PILOT_EVERY = 4
# What is believed before anything is evaluated, as much as `_WORTH` evaluations or layers would tell: that losses lie
# off c P by a half of it from state to state, and c by 0.3 of itself from layer to layer.
_WORTH = 4.0
_NOISE = 0.25
_SPREAD = 0.09
# A first-order loss can vanish where the real one cannot; this part of the pair's typical size is added to it.
_FLOOR = 0.05
_LEAST_RATIO = 1e-3
_NOTHING_KNOWN = 1e9
_TINY = 1e-30
_HALVINGS = 50


@dataclass(frozen=True)
class ScreenSettings:
    """targets: average bits of the plans that must be right, by the objective of the defaults and without pins. cap:
    largest part of all evaluations. Raises BudgetError for values outside their ranges.
    """

    targets: tuple[float, ...] = (3.0, 4.0, 6.0)
    cap: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.targets or not 0 < self.cap <= 1:
            raise BudgetError(f"--targets {self.targets}, --cap {self.cap}: expected a target, and a cap in (0, 1]")


@dataclass(frozen=True)
class ScreenProblem:
    """What is screened, as arrays.

    params: [U] weights per layer. stages, groups: [U] names; layers of one stage are alike, layers of one group share a
    choice. bits: [B] weight bits of the measured choices; full precision is added with loss 0. first_order: [U, B, N],
    P. phases: [N]. alpha, beta: of Eq. (14a).
    """

    params: np.ndarray
    stages: Sequence[str]
    groups: Sequence[str]
    bits: tuple[int, ...]
    first_order: np.ndarray
    phases: np.ndarray
    alpha: float
    beta: float


@dataclass(frozen=True)
class ScreenResult:
    """losses: [U, B, N], NaN where not evaluated. omega, omega_tau: estimates [U, B]. record: what the artefact says
    about the screening."""

    losses: np.ndarray
    omega: np.ndarray
    omega_tau: np.ndarray
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """Exact losses of one layer in one choice (as a column) on some states."""

    unit: int
    column: int
    states: tuple[int, ...]


Evaluate = Callable[[Sequence[Request]], Sequence[np.ndarray]]
"""Exact losses [states] of every request, in their order."""


@dataclass(frozen=True)
class Estimate:
    """By layer and choice, [U, B]: Omega, Omega_tau, and the radius of alpha Omega + beta Omega_tau."""

    omega: np.ndarray
    omega_tau: np.ndarray
    radius: np.ndarray

    @staticmethod
    def of(losses: np.ndarray, predicted: np.ndarray, problem: ScreenProblem) -> "Estimate":
        """losses: [U, B, N], NaN where not evaluated. predicted: [U, B, N], P."""
        seen = np.isfinite(losses)
        known, total = np.where(seen, predicted, 0.0).sum(-1), predicted.sum(-1)
        ratio = np.maximum((np.nansum(losses, -1) + _TINY) / (known + _TINY), _LEAST_RATIO)
        typical = predicted.mean(-1)
        noise = _noise(losses, predicted, ratio, problem.stages) * typical
        error = np.where(known > 0, noise / np.maximum(known, _TINY), _NOTHING_KNOWN)
        level, spread = _levels(np.log(ratio), known > 0, problem.stages)
        trust = spread / (spread + error)
        factor = np.exp(level + trust * (np.log(ratio) - level))
        filled = np.where(seen, losses, factor[..., None] * predicted)
        omega, omega_tau = filled.mean(-1), temporal_score(filled, problem.phases)
        unseen = total - known
        # Of what is not evaluated, c is off, and so are its states' losses, which partly cancel in the sum.
        variance = trust * error + np.where(unseen > 0, noise / np.maximum(unseen, _TINY), 0.0)
        part = unseen / total * np.sqrt(variance)
        radius = _DEVIATIONS * part * (problem.alpha * omega + problem.beta * omega_tau)
        return Estimate(omega, omega_tau, radius)


def _noise(losses: np.ndarray, predicted: np.ndarray, ratio: np.ndarray, stages: Sequence[str]) -> np.ndarray:
    """s by layer and choice, [U, B]: of the stage, from squared residuals in units of P mean(P)."""
    seen = np.isfinite(losses)
    residual = losses / ratio[..., None] - predicted
    squares = np.where(seen, residual**2 / (predicted * predicted.mean(-1, keepdims=True)), 0.0).sum(-1)
    freedom = np.maximum(seen.sum(-1) - 1, 0)
    found = np.zeros_like(ratio)
    for alike in _stages(stages):
        found[alike] = (squares[alike].sum(0) + _WORTH * _NOISE) / (freedom[alike].sum(0) + _WORTH)
    return found


def _levels(values: np.ndarray, known: np.ndarray, stages: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of `values` [U, B] over the layers of a stage that are known; of a stage that nothing is known
    of, over all layers."""
    level, spread = np.zeros_like(values), np.zeros_like(values)
    for column in range(values.shape[1]):
        of_all = np.median(values[known[:, column], column]) if known[:, column].any() else 0.0
        for alike in _stages(stages):
            here = values[alike & known[:, column], column]
            centre = (here.sum() + of_all) / (len(here) + 1)
            level[alike, column] = centre
            spread[alike, column] = (((here - centre) ** 2).sum() + _WORTH * _SPREAD) / (len(here) + _WORTH)
    return level, spread


def _stages(stages: Sequence[str]) -> list[np.ndarray]:
    """Per stage bool [U]: which layers are of it."""
    names = np.asarray(stages)
    return [names == name for name in np.unique(names)]


def state_order(first_order: np.ndarray, seed: int) -> list[int]:
    """All states, in turn the two with the largest loss that are left and a random one.

    Loss is relative to its pair's mean and averaged over pairs [U, B, N]. A sum is known best when its largest terms
    are measured and the small ones predicted; but a prediction is also large by chance, so the ratio of exact to
    predicted losses would come out too small from these states alone. Random ones show it as it is.
    """
    relative = first_order / (first_order.mean(-1, keepdims=True) + _TINY)
    largest = np.argsort(-relative.mean((0, 1)), kind="stable")
    left = {int(state): None for state in largest}
    random = iter(np.random.default_rng(seed).permutation(len(largest)).tolist())
    order: list[int] = []
    while left:
        by_chance = len(order) % 3 == 2
        state = next(one for one in random if one in left) if by_chance else next(iter(left))
        del left[state]
        order.append(state)
    return order


def first_look(units: int, bits: Sequence[int]) -> list[tuple[int, int]]:
    """Layers and choices (as columns) that are evaluated before anything is known: the narrowest choice, which is the
    worst predicted and matters most, and some layers in each other one, which show what to expect."""
    narrowest = int(np.argmin(bits))
    every = max(1, min(_PILOT_EVERY, units // 3))
    return [
        (unit, column)
        for unit in range(units)
        for column in range(len(bits))
        if column == narrowest or unit % every == column % every
    ]


def check_cap(settings: ScreenSettings, units: int, bits: Sequence[int], states: int) -> None:
    """Raises BudgetError for a cap that does not suffice for the first look."""
    every = units * len(bits) * states
    limit, needed = int(settings.cap * every), min(_PILOT, states) * len(first_look(units, bits))
    if needed > limit:
        raise BudgetError(
            f"--cap {settings.cap:g} allows {limit} evaluations, the first look needs {needed}; use at least "
            f"--cap {math.ceil(100 * needed / every) / 100:.2f}, more states, or --mode exact"
        )


class Screen:
    """The evaluations so far, and what follows from them."""

    def __init__(self, problem: ScreenProblem, settings: ScreenSettings, evaluate: Evaluate) -> None:
        self.problem = problem
        self.settings = settings
        self._evaluate = evaluate
        self.losses: np.ndarray = np.full(problem.first_order.shape, np.nan)
        typical = problem.first_order.mean(-1, keepdims=True) + _TINY
        self._predicted = np.hypot(problem.first_order, _FLOOR * typical)
        self._order = state_order(self._predicted, settings.seed)
        self._count = np.zeros(self.losses.shape[:2], np.int64)
        groups = np.unique(problem.groups, return_inverse=True)[1]
        self._in_group = (groups[:, None] == np.arange(groups.max() + 1)).astype(float)
        self._costs = (problem.params @ self._in_group)[:, None] * np.asarray([*problem.bits, 16.0])
        self._limit = int(settings.cap * self.losses.size)

    @property
    def evaluations(self) -> int:
        return int(self._count.sum())

    def run(self) -> ScreenResult:
        """A first look, then rounds of the pairs in doubt until there are none or the cap is reached."""
        units, _, states = self.losses.shape
        step = max(1, states // 16)
        self._extend(first_look(units, self.problem.bits), min(_PILOT, states))
        while True:
            estimate = Estimate.of(self.losses, self._predicted, self.problem)
            doubtful = self._doubtful(estimate)
            wanted = self._affordable(doubtful, step)
            if not wanted:
                break
            self._extend(wanted, step)
        record = {
            "targets": list(self.settings.targets),
            "alpha": self.problem.alpha,
            "beta": self.problem.beta,
            "cap": self.settings.cap,
            "seed": self.settings.seed,
            "evaluations": self.evaluations,
            "exhaustive_evaluations": self.losses.size,
            "in_doubt": len(doubtful),
            "reason": "cap on evaluations reached" if doubtful else "no choice in doubt at any target",
        }
        return ScreenResult(self.losses, estimate.omega, estimate.omega_tau, record)

    def _extend(self, wanted: Sequence[tuple[int, int]], step: int) -> None:
        """Evaluates the next `step` states of each (unit, column)."""
        requests = [
            Request(unit, column, tuple(self._order[count : count + step]))
            for unit, column in wanted
            for count in (int(self._count[unit, column]),)
        ]
        for request, losses in zip(requests, self._evaluate(requests), strict=True):
            self.losses[request.unit, request.column, list(request.states)] = losses
            self._count[request.unit, request.column] += len(request.states)

    def _doubtful(self, estimate: Estimate) -> list[tuple[int, int]]:
        """Pairs that are in doubt at some target and not evaluated on all states, largest radius first, relative to the
        plan's score."""
        scores = self._grouped(self.problem.alpha * estimate.omega + self.problem.beta * estimate.omega_tau)
        radius = np.sqrt(self._grouped(estimate.radius**2))
        rows = np.arange(len(scores))
        size: dict[tuple[int, int], float] = {}
        for target in self.settings.targets:
            budget = target * self.problem.params.sum()
            plan = cheapest(scores, self._costs, budget)
            adjusted = scores - radius
            adjusted[rows, plan] += 2 * radius[rows, plan]
            rival = cheapest(adjusted, self._costs, budget)
            value = float(scores[rows, plan].sum()) + _TINY
            for group in np.flatnonzero(plan != rival):
                for column in (int(plan[group]), int(rival[group])):
                    pair = int(group), column
                    size[pair] = max(size.get(pair, 0.0), float(radius[pair]) / value)
        order = sorted(size, key=lambda pair: -size[pair])
        return [
            (int(unit), column)
            for group, column in order
            if column < self.losses.shape[1]
            for unit in np.flatnonzero(self._in_group[:, group])
            if self._count[unit, column] < self.losses.shape[2]
        ]

    def _affordable(self, doubtful: Sequence[tuple[int, int]], step: int) -> list[tuple[int, int]]:
        """The first of these pairs: at most a hundredth of all evaluations, and never beyond the cap."""
        room = min(self._limit - self.evaluations, max(step, self.losses.size // 100))
        return list(doubtful[: room // step])

    def _grouped(self, values: np.ndarray) -> np.ndarray:
        """[U, B] summed over the layers of each group, with a column of zeros for full precision: [groups, B + 1]."""
        summed: np.ndarray = self._in_group.T @ values
        return np.pad(summed, ((0, 0), (0, 1)))


def cheapest(scores: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Lagrangian allocation: every group's best column at the smallest multiplier per bit at which all fit the budget.

    scores, costs: [groups, choices].
    """
    rows = np.arange(len(scores))

    def choose(multiplier: float) -> np.ndarray:
        best: np.ndarray = np.argmin(scores + multiplier * costs, axis=1)
        return best

    def fits(multiplier: float) -> bool:
        return bool(costs[rows, choose(multiplier)].sum() <= budget)

    if fits(0.0):
        return choose(0.0)
    low, high = 0.0, float(np.ptp(scores)) / float(costs.min()) + 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return choose(high)
