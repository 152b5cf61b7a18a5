"""Screened sensitivity: exact evaluation only where it can still change the allocation.

Very few passes predict the loss L of Eq. (9) of every layer, width and state to first order (`calibrator.proxy`): P.
Exact evaluations measure what P misses,

    L[unit, bits, state] = c[unit, bits] (Q[unit, bits, state] + e),    Var(e) = s[unit, bits] Q mean(Q),
    Q = P^g[stage, bits], scaled to the mean of P.

g is below 1 where losses saturate, as at 2 bits. ln c = a level of the layer's stage + a deviation of the layer, both
normal and correlated over widths. Layers of one stage differ little (0.01 at 8 bits, 0.05 at 4, 0.1 to 0.2 at 2); the
head, the only layer of its kind, may lie far from the others, so a stage is believed only as far as its own layers
were evaluated. With a variance that grows as Q, the ratio of the sums of L and Q is the best linear estimate of c (the
ratio estimator of survey sampling).

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

from vla_policy.core.errors import BudgetError

_DRAWS = 256
_HALVINGS = 40
_PILOT_EVERY = 4
_EM_STEPS = 30
# What is believed of a stage before any of its layers is evaluated, as much as this many evaluations would tell: that
# predictions are off by a half and by 0.2 more from layer to layer (standard deviations of ln c), by a half from state
# to state (variance 0.25), and in proportion (a slope of 1, with this sum of squares behind it).
_PRIOR_FREEDOM = 4.0
_STAGE_DEVIATION = 0.5
_LAYER_DEVIATION = 0.2
_NOISE = 0.25
_SLOPE_PRIOR = 4.0
_FLOOR = 0.05
_LEAST_RATIO = 1e-3
_NOTHING_KNOWN = 1e6
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
    width. bits: [B] measured widths, ascending; 16 is added with loss 0. predicted: [U, B, N], P. phases: [N]. alpha,
    beta: of Eq. (14a).
    """

    params: np.ndarray
    stages: Sequence[str]
    groups: Sequence[str]
    bits: tuple[int, ...]
    predicted: np.ndarray
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
    """Exact losses of one layer at some widths (as columns) on some states."""

    unit: int
    columns: tuple[int, ...]
    states: tuple[int, ...]


Evaluate = Callable[[Sequence[Request]], Sequence[np.ndarray]]
"""Exact losses [columns, states] of every request, in their order."""


def state_order(predicted: np.ndarray, seed: int) -> list[int]:
    """All states, in turn the two with the largest loss that are left and a random one.

    Loss is relative to its pair's mean and averaged over pairs [U, B, N]. A sum is known best when its largest terms
    are measured and the small ones predicted; but a prediction is also large by chance, so the ratio of exact to
    predicted losses would come out too small from these states alone. Random ones show it as it is.
    """
    relative = predicted / (predicted.mean(-1, keepdims=True) + _TINY)
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
        self.losses: np.ndarray = np.full(problem.predicted.shape, np.nan)
        # A first-order loss can vanish where the real one cannot; a part of the pair's typical size is added to it.
        typical = problem.predicted.mean(-1, keepdims=True) + _TINY
        self._first_order = np.hypot(problem.predicted, _FLOOR * typical)
        self._order = state_order(self._first_order, settings.seed)
        self._stage = np.unique(problem.stages, return_inverse=True)[1]
        self._count = np.zeros(self.losses.shape[:2], np.int64)
        self._model: _Ratios | None = None
        self._misses: list[float] = []
        self._generator = np.random.default_rng(settings.seed)
        names, self._group = np.unique(problem.groups, return_inverse=True)
        self._members = (self._group[:, None] == np.arange(len(names))).astype(float)
        self._costs = (problem.params @ self._members)[:, None] * np.asarray([*problem.bits, 16.0])

    @property
    def evaluations(self) -> int:
        return int(self._count.sum())

    @property
    def overdispersion(self) -> float:
        """How much larger the squared misses of the model's own predictions were than it expected; at least 1."""
        return max(1.0, float(np.mean(self._misses))) if self._misses else 1.0

    def run(self) -> ScreenResult:
        """Pilot, then rounds of the pairs that matter most until certain enough or out of evaluations."""
        units, widths, states = self.losses.shape
        limit = int(self.settings.cap * self.losses.size)
        step = max(1, states // 16)
        # The narrowest width is the worst predicted and matters most; of the others, some layers show what to expect.
        every = max(1, min(_PILOT_EVERY, units // 3))
        self._extend(
            {
                (unit, column)
                for unit in range(units)
                for column in range(widths)
                if column == 0 or unit % every == column % every
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
            "stop": {"reason": reason, "regret": shown, "draws": _DRAWS},
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
                self._misses.extend(self._model.miss(request, losses))
            self.losses[request.unit][np.ix_(request.columns, request.states)] = losses
            self._count[request.unit, list(request.columns)] += len(request.states)

    def _draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Draws of Omega and Omega_tau, [draws, U, B] each."""
        sizes = np.unique(self.problem.phases, return_counts=True)[1]
        self._model = _Ratios.fit(self.losses, self._first_order, self._stage)
        means = self._model.draw(self.losses, self.problem.phases, self.overdispersion, self._generator)
        return means @ (sizes / sizes.sum()), means.max(-1)

    def _regret(self, scores: np.ndarray) -> tuple[dict[str, Regret], np.ndarray]:
        """The regret per target relative to the plan's score, and each unit's and width's part in it [U, B].

        scores: [draws, U, B]. With a draw's own multiplier per bit, the reduced cost of the plan's width over the best
        one is an upper bound of what the plan loses there (Lagrangian duality); the sum over groups bounds the regret.
        A group's loss is blamed on the two widths that were confused, by the variance of their scores.
        """
        grouped = np.einsum("tub,ug->tgb", scores, self._members)
        grouped = np.concatenate([grouped, np.zeros((*grouped.shape[:2], 1))], axis=2)
        expected, variance = grouped.mean(0), grouped.var(0)
        regret: dict[str, Regret] = {}
        blame = np.zeros_like(expected)
        for target in self.settings.targets:
            budget = target * self.problem.params.sum()
            plan = cheapest(expected[None], self._costs, budget)[1][0]
            value = float(_pick(expected, plan).sum())
            multiplier, best = cheapest(grouped, self._costs, budget)
            reduced = grouped + multiplier[:, None, None] * self._costs
            lost = _pick(reduced, np.broadcast_to(plan, best.shape)) - _pick(reduced, best)
            doubt, doubt_of_best = _pick(variance, plan) + _TINY, np.take(variance, best + _rows(variance)) + _TINY
            share = doubt / (doubt + doubt_of_best)
            part = np.zeros_like(expected)
            part[np.arange(len(plan)), plan] = (lost * share).mean(0)
            for column in range(part.shape[1]):
                part[:, column] += (lost * (1 - share) * (best == column)).mean(0)
            relative = lost.sum(1) / max(value, _TINY)
            bound = np.quantile(relative, self.settings.confidence)
            regret[f"{target:g}"] = Regret(float(relative.mean()), float(bound))
            blame = np.maximum(blame, part / max(value, _TINY))
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


def cheapest(scores: np.ndarray, costs: np.ndarray, budget: float) -> tuple[np.ndarray, np.ndarray]:
    """Lagrangian allocation: the smallest multiplier per bit at which every group's best width fits the budget.

    scores: [draws, groups, widths]; costs: [groups, widths]. Returns every draw's multiplier and chosen columns
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
    """Flat offsets of the rows of `table` [groups, widths]."""
    return np.arange(len(table)) * table.shape[1]


def _pick(table: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The entry of every group at its column: `table` [..., groups, widths], `columns` [..., groups]."""
    return np.take_along_axis(table, columns[..., None], axis=-1)[..., 0]


@dataclass(frozen=True)
class _Levels:
    """Posterior of ln c of U layers in S stages at B widths.

    A layer's ln c, given its stage's level m, is normal with mean m + gain (observed - m) and covariance `own`; the
    levels are normal with mean `centre` and covariance `doubt`.

    stage: [U], index of the layer's stage. observed: [U, B], any where nothing is known. gain, own: [U, B, B].
    centre: [S, B]. doubt: [S, B, B].
    """

    stage: np.ndarray
    observed: np.ndarray
    gain: np.ndarray
    own: np.ndarray
    centre: np.ndarray
    doubt: np.ndarray

    @staticmethod
    def fit(observed: np.ndarray, error: np.ndarray, stage: np.ndarray) -> "_Levels":
        """EM: the layers' covariance that explains what was observed, and the levels under it.

        observed: [U, B], ln c. error: [U, B], its variance; `_NOTHING_KNOWN` where it was not observed.
        """
        units, widths = observed.shape
        known = error < _NOTHING_KNOWN
        usual = np.asarray([np.median(observed[known[:, column], column]) for column in range(widths)])
        member = (stage[:, None] == np.arange(stage.max() + 1)).astype(float)
        stage_precision = np.linalg.inv(_alike(_STAGE_DEVIATION, widths))
        prior = spread = _alike(_LAYER_DEVIATION, widths)
        for _ in range(_EM_STEPS):
            precision = np.linalg.inv(spread + error[..., None] * np.eye(widths))
            doubt = np.linalg.inv(stage_precision + np.einsum("us,ubc->sbc", member, precision))
            pull = np.einsum("us,ubc,uc->sb", member, precision, observed - usual)
            centre = usual + np.einsum("sbc,sc->sb", doubt, pull)
            gain = spread @ precision
            own = spread - gain @ spread
            mean = np.einsum("ubc,uc->ub", gain, observed - centre[stage])
            moment = own + gain @ doubt[stage] @ gain.swapaxes(1, 2) + mean[:, :, None] * mean[:, None, :]
            spread = (_PRIOR_FREEDOM * prior + moment.sum(0)) / (_PRIOR_FREEDOM + units)
        return _Levels(stage, observed, gain, own, centre, doubt)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of every ln c, [U, B] each."""
        centre = self.centre[self.stage]
        mean = centre + np.einsum("ubc,uc->ub", self.gain, self.observed - centre)
        rest = np.eye(centre.shape[1]) - self.gain
        covariance = self.own + rest @ self.doubt[self.stage] @ rest.swapaxes(1, 2)
        return mean, np.diagonal(covariance, axis1=1, axis2=2)

    def draw(self, overdispersion: float, generator: np.random.Generator) -> np.ndarray:
        """Draws of ln c, [draws, U, B]. overdispersion: factor of all variances."""
        centre = (self.centre + _normal(overdispersion * self.doubt, generator))[:, self.stage]
        pull = np.einsum("ubc,tuc->tub", self.gain, self.observed - centre)
        return centre + pull + _normal(overdispersion * self.own, generator)


def _alike(deviation: float, widths: int) -> np.ndarray:
    """Covariance [B, B] of a quantity with this standard deviation that is half the same at all widths."""
    return deviation**2 * (np.eye(widths) + 1) / 2


def _normal(covariance: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draws around 0, [draws, K, B], of K normals with `covariance` [K, B, B]."""
    count, widths, _ = covariance.shape
    roots = np.linalg.cholesky(covariance + 1e-9 * np.eye(widths))
    return np.einsum("kbc,tkc->tkb", roots, generator.standard_normal((_DRAWS, count, widths)))


@dataclass(frozen=True)
class _Ratios:
    """Posterior of c and s in L = c (Q + e), Var(e) = s Q mean(Q).

    predicted: [U, B, N], Q. scale: [U, B], s mean(Q). freedom: [U, B], degrees of freedom that s is known with.
    """

    predicted: np.ndarray
    levels: _Levels
    scale: np.ndarray
    freedom: np.ndarray

    @staticmethod
    def fit(losses: np.ndarray, first_order: np.ndarray, stage: np.ndarray) -> "_Ratios":
        """losses: [U, B, N], NaN where not evaluated. first_order: [U, B, N], P. stage: [U], indices."""
        seen = np.isfinite(losses)
        predicted = _bent(losses, first_order, stage)
        count = seen.sum(-1)
        weight = np.where(seen, predicted, 0.0).sum(-1)
        ratio = np.maximum((np.nansum(losses, -1) + _TINY) / (weight + _TINY), _LEAST_RATIO)
        typical = predicted.mean(-1)
        squares = (losses / ratio[..., None] - predicted) ** 2 / (predicted * typical[..., None])
        noise, freedom = _noise(squares, count, stage)
        error = np.where(count > 0, noise * typical / np.maximum(weight, _TINY), _NOTHING_KNOWN)
        return _Ratios(predicted, _Levels.fit(np.log(ratio), error, stage), noise * typical, freedom)

    def miss(self, request: Request, losses: np.ndarray) -> list[float]:
        """Squared errors of the sums of `losses` [columns, states] in units of the variances that were expected."""
        columns = list(request.columns)
        mean, variance = (each[request.unit, columns] for each in self.levels.moments())
        total = self.predicted[request.unit][np.ix_(columns, request.states)].sum(-1)
        expected = variance * total**2 + self.scale[request.unit, columns] * total
        return list((losses.sum(-1) / np.exp(mean) - total) ** 2 / expected)

    def draw(
        self,
        losses: np.ndarray,
        phases: np.ndarray,
        overdispersion: float,
        generator: np.random.Generator,
    ) -> np.ndarray:
        """Every pair's mean loss per phase, [draws, U, B, phases that have states]: evaluated states as they are.

        The sum over the others is gamma: never negative, with the model's mean and variance. overdispersion: factor of
        all variances.
        """
        ratio = np.exp(self.levels.draw(overdispersion, generator))
        freedom = np.broadcast_to(self.freedom, ratio.shape)
        scale = overdispersion * self.scale * freedom / generator.chisquare(freedom)
        means = []
        for phase in np.unique(phases):
            here = losses[..., phases == phase]
            unseen = np.where(np.isnan(here), self.predicted[..., phases == phase], 0.0).sum(-1)
            rest = ratio * scale * generator.gamma(unseen / scale)
            means.append((np.nansum(here, -1) + rest) / here.shape[-1])
        return np.stack(means, -1)


def _bent(losses: np.ndarray, first_order: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """Q: P^g scaled to the mean of P, with one g per stage and width from all its layers' evaluated states: the slope
    of ln L over ln P within a layer, shrunk to 1. All arrays as in `_Ratios.fit`."""
    seen = np.isfinite(losses)
    count = np.maximum(seen.sum(-1, keepdims=True), 1)
    typical = first_order.mean(-1, keepdims=True)
    size = np.log(first_order / typical)
    ratio = np.log(np.where(seen, np.maximum(losses / first_order, _LEAST_RATIO), 1.0))
    size_here = np.where(seen, size - np.where(seen, size, 0.0).sum(-1, keepdims=True) / count, 0.0)
    slope = _by_stage((size_here * ratio).sum(-1), stage) / (_by_stage((size_here**2).sum(-1), stage) + _SLOPE_PRIOR)
    bent = np.exp((1 + slope)[..., None] * size)
    return bent * typical / bent.mean(-1, keepdims=True)


def _by_stage(values: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """`values` [U, B] summed over the layers of each layer's stage: [U, B]."""
    member = (stage[:, None] == stage).astype(float)
    return member @ values


def _noise(squares: np.ndarray, count: np.ndarray, stage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s by unit and width, and its degrees of freedom: that of the stage and width, times a factor of the layer that is
    shrunk to 1. A stage is only believed to be predicted well as far as its own layers have shown it.

    squares: [U, B, N], squared residuals in units of Q mean(Q), NaN where not evaluated.
    """
    freedom = np.maximum(count - 1, 0)
    squares = np.where(freedom > 0, np.nansum(squares, -1), 0.0)
    expected = (_by_stage(squares, stage) + _PRIOR_FREEDOM * _NOISE) / (_by_stage(freedom, stage) + _PRIOR_FREEDOM)
    of_unit = freedom.sum(1) + _PRIOR_FREEDOM
    factor = ((squares / expected).sum(1) + _PRIOR_FREEDOM) / of_unit
    return factor[:, None] * expected, np.repeat(of_unit[:, None].astype(float), squares.shape[1], 1)
