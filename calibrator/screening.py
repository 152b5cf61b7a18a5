"""Screened sensitivity: exact evaluation only where it can still change the allocation.

What is known at little cost is the first-order action error of every layer and width (`calibrator.proxy`). What is
wanted are plans at a few average widths. In between stands a model of the soft-bottleneck losses L of Eq. (9),

    ln L[unit, bits, state] = m[bits] + c ln proxy[unit, bits] + g[unit] + h[unit, bits] + d[unit, state] + e,

all terms but m and c normal with variances estimated from what has been evaluated. Its posterior predictive is sampled
as whole tables of losses: evaluated states are what they are, the others are drawn. Every sampled table gives Omega and
Omega_tau by Eqs. (10) to (13) and its own best plan, so the expected regret of the plan in hand, and which layers cause
it, are averages over tables. The layers that cause most are evaluated on more states, until the expected regret is
below the tolerance at every target or the cap on evaluations is reached; which of the two is recorded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calibrator.scores import temporal_score
from vla_policy.core.errors import BudgetError

_TABLES = 48
_WIDEST_EVERY = 4
_FLOOR = 1e-12
_MIN_VARIANCE = 1e-4


@dataclass(frozen=True)
class ScreenSettings:
    """targets: average bits of the plans that must be right. tolerance: accepted expected regret, part of the plan's
    score. pilot: states on which every layer and width is evaluated first. cap: largest part of all evaluations.
    """

    targets: tuple[float, ...] = (3.0, 4.0, 6.0)
    tolerance: float = 0.005
    pilot: int = 2
    cap: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class ScreenProblem:
    """What is screened, as arrays.

    params: [U] weights per layer. groups: layers that share a width, as index lists. bits: [B] measured widths; 16 is
    added with loss 0. proxy: [U, B]. phases: [N]. alpha, beta: of Eq. (14a).
    """

    params: np.ndarray
    groups: tuple[tuple[int, ...], ...]
    bits: tuple[int, ...]
    proxy: np.ndarray
    phases: np.ndarray
    alpha: float
    beta: float


@dataclass
class ScreenResult:
    """losses: [U, B, N], NaN where not evaluated. omega, omega_tau: posterior means [U, B], omega_deviation: of omega.
    record: what the artefact says about the screening.
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


def state_order(phases: np.ndarray, seed: int) -> list[int]:
    """States in an order whose beginnings cover all phases: one of each phase, then a second, ..."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(phases))
    rank = np.zeros(len(phases), np.int64)
    for phase in np.unique(phases):
        members = order[phases[order] == phase]
        rank[members] = np.arange(len(members))
    return [int(state) for state in order[np.argsort(rank[order], kind="stable")]]


class Screen:
    """The evaluations so far, and what follows from them."""

    def __init__(self, problem: ScreenProblem, settings: ScreenSettings, evaluate: Evaluate) -> None:
        if settings.pilot < 2:
            raise BudgetError(f"--pilot {settings.pilot}: at least 2 states are needed to see how much states differ")
        self.problem = problem
        self.settings = settings
        self._evaluate = evaluate
        units, widths = problem.proxy.shape
        self.losses = np.full((units, widths, len(problem.phases)), np.nan)
        self._order = state_order(problem.phases, settings.seed)
        self._count = np.zeros((units, widths), np.int64)
        self._generator = np.random.default_rng(settings.seed)

    @property
    def evaluations(self) -> int:
        return int(self._count.sum())

    def run(self) -> ScreenResult:
        """Pilot, then rounds of the most contested layers until certain enough or out of evaluations."""
        units, widths, states = self.losses.shape
        limit = int(self.settings.cap * units * widths * states)
        step = max(1, states // 16)
        # The widest format is the best predicted and matters least: a part of the layers is enough to place it.
        every = max(1, min(_WIDEST_EVERY, units // 3))
        most, last = tuple(range(widths - 1)), (widths - 1,)
        pilot = {unit: most + last if unit % every == 0 or widths == 1 else most for unit in range(units)}
        self._extend(pilot, self.settings.pilot)
        rounds: list[dict[str, Any]] = []
        while True:
            tables = self._tables()
            regret, blame = self._regret(tables)
            rounds.append({"evaluations": self.evaluations, "expected_regret": regret})
            if max(regret.values()) <= self.settings.tolerance:
                reason = "expected regret within tolerance at every target"
                break
            wanted = self._most_contested(blame, limit - self.evaluations, step)
            if not wanted:
                reason = "cap on evaluations reached"
                break
            self._extend(wanted, step)
        return self._result(tables, rounds, reason, units * widths * states)

    def _extend(self, wanted: Mapping[int, tuple[int, ...]], step: int) -> None:
        """Evaluates the next `step` states of each unit's widths; widths at the same count share their passes."""
        states = self.losses.shape[2]
        requests = []
        for unit, columns in wanted.items():
            for count in sorted({int(self._count[unit, column]) for column in columns}):
                same = tuple(column for column in columns if self._count[unit, column] == count)
                if chosen := tuple(self._order[count : min(count + step, states)]):
                    requests.append(Request(unit, same, chosen))
        for request, losses in zip(requests, self._evaluate(requests), strict=True):
            self.losses[request.unit][np.ix_(request.columns, request.states)] = losses
            self._count[request.unit, list(request.columns)] += len(request.states)

    def _tables(self) -> np.ndarray:
        """Posterior predictive tables of losses, [tables, U, B, N]."""
        model = _Model.fit(self.losses, self.problem.proxy)
        return model.draw(self.losses, _TABLES, self._generator)

    def _scores(self, tables: np.ndarray) -> np.ndarray:
        """alpha Omega + beta Omega_tau by group and width, [tables, groups, B + 1]; the last width is 16 bits."""
        problem = self.problem
        score = problem.alpha * tables.mean(-1) + problem.beta * temporal_score(tables, problem.phases)
        grouped = np.stack([score[:, list(group)].sum(1) for group in problem.groups], axis=1)
        return np.concatenate([grouped, np.zeros((*grouped.shape[:2], 1))], axis=2)

    def _costs(self) -> np.ndarray:
        """Bits of every group and width, [groups, B + 1]."""
        params = np.asarray([self.problem.params[list(group)].sum() for group in self.problem.groups])
        return params[:, None] * np.asarray([*self.problem.bits, 16.0])

    def _regret(self, tables: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
        """Expected regret per target relative to the plan's score, and each group's and width's part in it.

        With a table's own multiplier per bit, the reduced cost of the plan's width over the best one is an upper
        bound of what the plan loses there (Lagrangian duality); the sum over groups bounds the regret.
        """
        scores, costs = self._scores(tables), self._costs()
        expected = scores.mean(0)
        everyone = np.arange(len(costs))
        regret: dict[str, float] = {}
        blame = np.zeros_like(expected)
        for target in self.settings.targets:
            budget = target * self.problem.params.sum()
            _, plan = cheapest(expected, costs, budget)
            lost = np.zeros(len(costs))
            part = np.zeros_like(expected)
            for table in scores:
                multiplier, best = cheapest(table, costs, budget)
                reduced = table + multiplier * costs
                loss = reduced[everyone, plan] - reduced[everyone, best]
                lost += loss
                part[everyone, best] += loss
                part[everyone, plan] += loss
            value = expected[everyone, plan].sum()
            regret[f"{target:g}"] = float(lost.sum() / len(scores) / value) if value > 0 else 0.0
            blame = np.maximum(blame, part / len(scores) / value if value > 0 else part)
        return regret, blame

    def _most_contested(self, blame: np.ndarray, room: int, step: int) -> dict[int, tuple[int, ...]]:
        """Layers and width columns for the next round: the largest parts of the regret first."""
        states, widths = self.losses.shape[2], len(self.problem.bits)
        wanted: dict[int, list[int]] = {}
        pairs = [(value, group, column) for (group, column), value in np.ndenumerate(blame[:, :widths]) if value > 0]
        allowed = min(room, max(step, int(0.01 * self.losses.size)))
        for _, group, column in sorted(pairs, reverse=True):
            members = [unit for unit in self.problem.groups[group] if self._count[unit, column] < states]
            need = sum(min(step, states - int(self._count[unit, column])) for unit in members)
            if not members or need > allowed:
                continue
            allowed -= need
            for unit in members:
                wanted.setdefault(unit, []).append(column)
        return {unit: tuple(sorted(columns)) for unit, columns in wanted.items()}

    def _result(self, tables: np.ndarray, rounds: list[dict[str, Any]], reason: str, exhaustive: int) -> ScreenResult:
        omega = tables.mean(-1)
        record = {
            "targets": list(self.settings.targets),
            "tolerance": self.settings.tolerance,
            "pilot_states": self.settings.pilot,
            "cap": self.settings.cap,
            "seed": self.settings.seed,
            "evaluations": self.evaluations,
            "exhaustive_evaluations": exhaustive,
            "rounds": rounds,
            "stop": {"reason": reason, "expected_regret": rounds[-1]["expected_regret"], "tables": _TABLES},
        }
        temporal = temporal_score(tables, self.problem.phases).mean(0)
        return ScreenResult(self.losses, omega.mean(0), temporal, omega.std(0), record)


def cheapest(scores: np.ndarray, costs: np.ndarray, budget: float) -> tuple[float, np.ndarray]:
    """Lagrangian allocation: the smallest multiplier per bit at which every group's best width fits the budget.

    scores, costs: [groups, widths]. Returns the multiplier and the chosen columns.
    """
    everyone = np.arange(len(costs))

    def choose(multiplier: float) -> np.ndarray:
        return np.argmin(scores + multiplier * costs, axis=1)

    if costs[everyone, choose(0.0)].sum() <= budget:
        return 0.0, choose(0.0)
    low, high = 0.0, float(scores.max() / costs.min()) + 1.0
    for _ in range(80):
        middle = (low + high) / 2
        if costs[everyone, choose(middle)].sum() <= budget:
            high = middle
        else:
            low = middle
    return high, choose(high)


@dataclass(frozen=True)
class _Model:
    """Posterior of the log-losses' level f[unit, bits] and the variances of what remains per state."""

    mean: np.ndarray
    covariance: np.ndarray
    state_variance: float
    noise_variance: float

    @staticmethod
    def fit(losses: np.ndarray, proxy: np.ndarray) -> "_Model":
        """Moment estimates of the variances and the normal posterior of every unit's levels."""
        logs = np.log(np.maximum(losses, _FLOOR))
        count = np.isfinite(logs).sum(-1)
        level = np.where(count > 0, np.nansum(logs, axis=-1) / np.maximum(count, 1), np.nan)
        shared, noise = _within_variances(logs, level)
        prior = _regress(np.log(np.maximum(proxy, _FLOOR**2)), level, count)
        between_units, between_widths = _between_variances(level - prior, shared, noise, count)
        units, widths = level.shape
        prior_covariance = between_units + between_widths * np.eye(widths)
        means = np.zeros_like(level)
        covariances = np.zeros((units, widths, widths))
        for unit in range(units):
            seen = np.flatnonzero(count[unit])
            often = count[unit, seen]
            observed = prior_covariance[np.ix_(seen, seen)] + shared / np.maximum.outer(often, often)
            gain = prior_covariance[:, seen] @ np.linalg.inv(observed + np.diag(noise / often))
            means[unit] = prior[unit] + gain @ (level[unit, seen] - prior[unit, seen])
            covariances[unit] = prior_covariance - gain @ prior_covariance[seen]
        return _Model(means, covariances, shared, noise)

    def draw(self, losses: np.ndarray, tables: int, generator: np.random.Generator) -> np.ndarray:
        """Tables of losses: evaluated entries as they are, the others from the posterior predictive."""
        units, widths, states = losses.shape
        roots = np.linalg.cholesky(self.covariance + 1e-10 * np.eye(widths))
        levels = self.mean + np.einsum("ubc,tuc->tub", roots, generator.standard_normal((tables, units, widths)))
        shared = self.state_variance**0.5 * generator.standard_normal((tables, units, 1, states))
        noise = self.noise_variance**0.5 * generator.standard_normal((tables, units, widths, states))
        return np.where(np.isfinite(losses), losses, np.exp(levels[..., None] + shared + noise))


def _within_variances(logs: np.ndarray, level: np.ndarray) -> tuple[float, float]:
    """Variance per state that a unit's widths share, and that they do not, pooled over units."""
    residual = logs - level[..., None]
    count = np.isfinite(residual).sum()
    # Every pair's own mean costs one degree of freedom.
    total = np.nansum(residual**2) / max(1, count - np.isfinite(level).sum())
    products, freedom = 0.0, 0.0
    for one in range(level.shape[1]):
        for other in range(one):
            both = residual[:, one] * residual[:, other]
            known = np.isfinite(both).sum(-1)
            products += float(np.nansum(both))
            freedom += float(np.maximum(known - 1, 0).sum())
    shared = min(max(products / max(1.0, freedom), 0.0), total - _MIN_VARIANCE)
    return float(max(shared, 0.0)), float(max(total - shared, _MIN_VARIANCE))


def _regress(log_proxy: np.ndarray, level: np.ndarray, count: np.ndarray) -> np.ndarray:
    """m[bits] + c ln proxy, weighted by how often each pair was evaluated; [U, B]."""
    units, widths = level.shape
    columns = [np.repeat(np.eye(widths)[None], units, 0).reshape(-1, widths), log_proxy.reshape(-1, 1)]
    design = np.concatenate(columns, axis=1)
    weight = np.sqrt(count.reshape(-1, 1).astype(float))
    known = np.nan_to_num(level).reshape(-1, 1)  # weight 0 where nothing was evaluated
    solution, *_ = np.linalg.lstsq(design * weight, known * weight, rcond=None)
    return (design @ solution).reshape(units, widths)


def _between_variances(
    residual: np.ndarray, shared: float, noise: float, count: np.ndarray
) -> tuple[float, float]:
    """Variances of g (per unit) and h (per unit and width), what evaluation noise explains taken off."""
    widths, often = residual.shape[1], np.maximum(count, 1)
    cross = [
        np.nanmean(residual[:, one] * residual[:, other] - shared / np.maximum(often[:, one], often[:, other]))
        for one in range(widths)
        for other in range(one)
    ]
    between_units = max(float(np.mean(cross)) if cross else 0.0, _MIN_VARIANCE)
    total = float(np.nanmean(residual**2 - (shared + noise) / often))
    return between_units, max(total - between_units, _MIN_VARIANCE)
