"""Screened sensitivity: exact evaluation only where it can still change the allocation.

Very few passes predict the loss L of Eq. (9) of every layer, choice and state to first order (`proxy`): P.
What exact evaluations tell beyond it is in `loss_model`.

The posterior of a pair's phase means (Eq. (12)) is drawn: evaluated states are what they are, the others are predicted.
Every draw gives Omega and Omega_tau and its own best plan; how much worse the plan in hand is there is the regret of
that draw. The pairs that cause most of it are evaluated on more states until the regret is within the tolerance in
nearly all draws at every target, or the cap on evaluations is reached; which of the two is recorded. States come in one
order for all layers, so that they share passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from calibrator.sensitivity.loss_model import DRAWS, LossModel, membership
from vla_policy.core.errors import BudgetError

_HALVINGS = 40
_PILOT_EVERY = 4
_FLOOR = 0.05
_TINY = 1e-30


@dataclass(frozen=True)
class ScreenSettings:
    """targets: average bits of the plans that must be right. tolerance: accepted regret, as a part of the plan's
    score; confidence: probability with which it is kept. pilot: states on which layers are evaluated before anything is
    known. cap: largest part of all evaluations. Raises BudgetError for values outside their ranges.
    """

    targets: tuple[float, ...] = (3.0, 4.0, 6.0)
    tolerance: float = 0.01
    confidence: float = 0.95
    pilot: int = 2
    cap: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pilot < 2:
            raise BudgetError(f"--pilot {self.pilot}: at least 2 states are needed to see how much states differ")
        if not (self.tolerance >= 0 and 0 < self.confidence < 1 and 0 < self.cap <= 1):
            raise BudgetError(
                f"--tolerance {self.tolerance}, --confidence {self.confidence}, --cap {self.cap}: expected "
                "tolerance >= 0, confidence in (0, 1), cap in (0, 1]"
            )


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
class Regret:
    """How much worse than the best the plan is, as a part of its score: the mean over draws, and what it exceeds in no
    more draws than the confidence leaves."""

    expected: float
    bound: float


@dataclass(frozen=True)
class ScreenResult:
    """losses: [U, B, N], NaN where not evaluated. omega, omega_tau: posterior means [U, B]; omega_deviation: standard
    deviation of omega. record: what the artefact says about the screening.
    """

    losses: np.ndarray
    omega: np.ndarray
    omega_tau: np.ndarray
    omega_deviation: np.ndarray
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """Exact losses of one layer in some choices (as columns) on some states."""

    unit: int
    columns: tuple[int, ...]
    states: tuple[int, ...]


Evaluate = Callable[[Sequence[Request]], Sequence[np.ndarray]]
"""Exact losses [columns, states] of every request, in their order."""


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


class Screen:
    """The evaluations so far, and what follows from them."""

    def __init__(self, problem: ScreenProblem, settings: ScreenSettings, evaluate: Evaluate) -> None:
        self.problem = problem
        self.settings = settings
        self._evaluate = evaluate
        self.losses: np.ndarray = np.full(problem.first_order.shape, np.nan)
        # A first-order loss can vanish where the real one cannot; a part of the pair's typical size is added to it.
        typical = problem.first_order.mean(-1, keepdims=True) + _TINY
        self._first_order = np.hypot(problem.first_order, _FLOOR * typical)
        self._order = state_order(self._first_order, settings.seed)
        self._stage = np.unique(problem.stages, return_inverse=True)[1]
        self._count = np.zeros(self.losses.shape[:2], np.int64)
        self._model: LossModel | None = None
        self._misses: list[float] = []
        self._generator = np.random.default_rng(settings.seed)
        self._group = np.unique(problem.groups, return_inverse=True)[1]
        self._in_group = membership(self._group)
        self._costs = (problem.params @ self._in_group)[:, None] * np.asarray([*problem.bits, 16.0])

    @property
    def evaluations(self) -> int:
        return int(self._count.sum())

    @property
    def overdispersion(self) -> float:
        """How much larger the squared misses of the model's own predictions were than it expected; at least 1."""
        return max(1.0, float(np.mean(self._misses))) if self._misses else 1.0

    def run(self) -> ScreenResult:
        """Pilot, then rounds of the pairs that matter most until certain enough or out of evaluations."""
        units, choices, states = self.losses.shape
        limit = int(self.settings.cap * self.losses.size)
        step = max(1, states // 16)
        # The narrowest choice is the worst predicted and matters most; of the others, some layers show what to expect.
        narrowest = int(np.argmin(self.problem.bits))
        every = max(1, min(_PILOT_EVERY, units // 3))
        self._extend(
            {
                (unit, column)
                for unit in range(units)
                for column in range(choices)
                if column == narrowest or unit % every == column % every
            },
            self.settings.pilot,
        )
        rounds: list[dict[str, Any]] = []
        while True:
            omega, omega_tau = self._draw()
            scores = self.problem.alpha * omega + self.problem.beta * omega_tau
            regret, blame = self._regret(scores)
            shown = {key: asdict(one) for key, one in regret.items()}
            rounds.append({"evaluations": self.evaluations, "regret": shown})
            if max(one.bound for one in regret.values()) <= self.settings.tolerance:
                reason = "regret within tolerance at every target"
                break
            room = limit - self.evaluations
            # A plan may be in doubt through the multiplier alone, when no pair is to blame: then the least known ones.
            wanted = self._most_blamed(blame, room, step) or self._most_blamed(scores.var(0), room, step)
            if not wanted:
                reason = "cap on evaluations reached"
                break
            self._extend(wanted, step)
        record = {
            "targets": list(self.settings.targets),
            "tolerance": self.settings.tolerance,
            "confidence": self.settings.confidence,
            "pilot_states": self.settings.pilot,
            "cap": self.settings.cap,
            "seed": self.settings.seed,
            "evaluations": self.evaluations,
            "exhaustive_evaluations": self.losses.size,
            "rounds": rounds,
            "overdispersion": self.overdispersion,
            "stop": {"reason": reason, "regret": shown, "draws": DRAWS},
        }
        return ScreenResult(self.losses, omega.mean(0), omega_tau.mean(0), omega.std(0), record)

    def _extend(self, wanted: set[tuple[int, int]], step: int) -> None:
        """Evaluates the next `step` states of each (unit, column); columns at the same count share their passes."""
        states = self.losses.shape[2]
        together: dict[tuple[int, int], list[int]] = {}
        for unit, column in sorted(wanted):
            together.setdefault((unit, int(self._count[unit, column])), []).append(column)
        requests = [
            Request(unit, tuple(columns), tuple(self._order[count : min(count + step, states)]))
            for (unit, count), columns in together.items()
            if count < states
        ]
        for request, losses in zip(requests, self._evaluate(requests), strict=True):
            if self._model is not None:
                self._misses.extend(self._model.miss(request.unit, request.columns, request.states, losses))
            self.losses[request.unit][np.ix_(request.columns, request.states)] = losses
            self._count[request.unit, list(request.columns)] += len(request.states)

    def _draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Draws of Omega and Omega_tau, [draws, U, B] each."""
        sizes = np.unique(self.problem.phases, return_counts=True)[1]
        self._model = LossModel.fit(self.losses, self._first_order, self._stage)
        means = self._model.draw(self.losses, self.problem.phases, self.overdispersion, self._generator)
        return means @ (sizes / sizes.sum()), means.max(-1)

    def _regret(self, scores: np.ndarray) -> tuple[dict[str, Regret], np.ndarray]:
        """Per target, how much worse than the best its plan is; and each unit's and choice's part in that, the largest
        over the targets, [U, B]. scores: [draws, U, B]."""
        grouped = np.einsum("tub,ug->tgb", scores, self._in_group)
        grouped = np.concatenate([grouped, np.zeros((*grouped.shape[:2], 1))], axis=2)
        regret: dict[str, Regret] = {}
        blame = np.zeros(grouped.shape[1:])
        for target in self.settings.targets:
            lost = Lost.of(grouped, self._costs, target * self.problem.params.sum())
            regret[f"{target:g}"] = lost.regret(self.settings.confidence)
            blame = np.maximum(blame, lost.blame(grouped.var(0)))
        return regret, blame[self._group, :-1]

    def _most_blamed(self, blame: np.ndarray, room: int, step: int) -> set[tuple[int, int]]:
        """The pairs of the next round, the largest in `blame` [U, B]: at most a hundredth of all evaluations."""
        states = self.losses.shape[2]
        allowed = min(room, max(step, self.losses.size // 100))
        wanted: set[tuple[int, int]] = set()
        for flat in np.argsort(-blame, axis=None, kind="stable"):
            unit, column = divmod(int(flat), blame.shape[1])
            need = min(step, states - int(self._count[unit, column]))
            if blame[unit, column] <= 0 or need > allowed:
                break
            if need:
                wanted.add((unit, column))
                allowed -= need
        return wanted


@dataclass(frozen=True)
class Lost:
    """What the plan that is best by the expected scores loses in every draw, by Lagrangian duality.

    With a draw's own multiplier per bit, the reduced cost of a group's planned choice over that of its best one is an
    upper bound of what the plan loses there; the sum over groups bounds the plan's regret.

    plan: [groups], columns. best: [draws, groups], columns of every draw's own best plan. by_group: [draws, groups].
    value: expected score of the plan.
    """

    plan: np.ndarray
    best: np.ndarray
    by_group: np.ndarray
    value: float

    @staticmethod
    def of(scores: np.ndarray, costs: np.ndarray, budget: float) -> "Lost":
        """scores: [draws, groups, choices]; costs: [groups, choices]."""
        expected = scores.mean(0)
        plan = cheapest(expected[None], costs, budget)[1][0]
        multiplier, best = cheapest(scores, costs, budget)
        reduced = scores + multiplier[:, None, None] * costs
        by_group = _pick(reduced, np.broadcast_to(plan, best.shape)) - _pick(reduced, best)
        return Lost(plan, best, by_group, max(float(_pick(expected, plan).sum()), _TINY))

    def regret(self, confidence: float) -> Regret:
        relative = self.by_group.sum(1) / self.value
        return Regret(float(relative.mean()), float(np.quantile(relative, confidence)))

    def blame(self, variance: np.ndarray) -> np.ndarray:
        """Every group's and choice's part in the regret, [groups, choices].

        A group's loss is blamed on the two choices that were confused, by the `variance` of their scores.
        """
        doubt = _pick(variance, self.plan) + _TINY
        doubt_of_best = np.take(variance, self.best + _rows(variance)) + _TINY
        share = doubt / (doubt + doubt_of_best)
        part = np.zeros_like(variance)
        part[np.arange(len(self.plan)), self.plan] = (self.by_group * share).mean(0)
        for column in range(part.shape[1]):
            part[:, column] += (self.by_group * (1 - share) * (self.best == column)).mean(0)
        return part / self.value


def cheapest(scores: np.ndarray, costs: np.ndarray, budget: float) -> tuple[np.ndarray, np.ndarray]:
    """Lagrangian allocation: the smallest multiplier per bit at which every group's best choice fits the budget.

    scores: [draws, groups, choices]; costs: [groups, choices]. Returns every draw's multiplier and chosen columns
    [draws, groups].
    """

    def choose(multiplier: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        best = np.argmin(scores + multiplier[:, None, None] * costs, axis=2)
        return best, np.take(costs, best + _rows(costs)).sum(1) <= budget

    low = np.zeros(len(scores))
    high = np.where(choose(low)[1], 0.0, scores.max((1, 2)) / costs.min() + 1.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = choose(middle)[1]
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    return high, choose(high)[0]


def _rows(table: np.ndarray) -> np.ndarray:
    """Flat offsets of the rows of `table` [groups, choices]."""
    return np.arange(len(table)) * table.shape[1]


def _pick(table: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The entry of every group at its column: `table` [..., groups, choices], `columns` [..., groups]."""
    return np.take_along_axis(table, columns[..., None], axis=-1)[..., 0]
