"""Mixed-precision bit allocation: Mix-QVLA Eqs. (14) and (15), and QVLA's greedy demotion for comparison."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from calibrator.allocation.options import Budget, Group, Option, ladder, totals
from vla_policy.core.errors import ArtefactError, BudgetError

Solver = Literal["HIGHS", "ECOS_BB"]
# HiGHS accepts rows up to this far beyond their limit (rows are scaled to 1); what it returns is checked exactly.
_FEASIBILITY = 1e-9


@dataclass(frozen=True)
class Solution:
    """One option per group, in their order. bound: of the objective, proven; gap: (objective - bound) / objective."""

    options: tuple[Option, ...]
    objective: float
    bound: float
    gap: float
    solver: str


def feasible_range(groups: Sequence[Group], budget: Budget) -> tuple[float, float]:
    """Smallest and largest total of a budget's cost over all assignments."""
    costs = [[option.cost(budget.cost) for option in group.options] for group in groups]
    return sum(map(min, costs)), sum(map(max, costs))


def check_budgets(groups: Sequence[Group], budgets: Sequence[Budget]) -> None:
    """Raises BudgetError when a budget alone cannot be met, naming the nearest one that can."""
    for budget in budgets:
        low, high = feasible_range(groups, budget)
        if budget.limit < low:
            raise BudgetError(
                f"{budget.label} {budget.shown(budget.limit)} is below the minimum {budget.shown(low)}; "
                f"feasible: {budget.shown(low)} to {budget.shown(high)}. Raise it, or unpin layers"
            )


def solve(groups: Sequence[Group], budgets: Sequence[Budget], solver: Solver = "HIGHS") -> Solution:
    """The assignment that minimises the summed score within all budgets.

    HIGHS proves optimality (relative gap 0); ECOS_BB is the paper's and is compared with the linear relaxation.
    Raises BudgetError when the budgets cannot be met together, ArtefactError for a score that was not evaluated.
    """
    _check_scores(groups)
    check_budgets(groups, budgets)
    picks, bound = _solve_binary(groups, budgets, solver)
    options = tuple(group.options[pick] for group, pick in zip(groups, picks, strict=True))
    _check(options, budgets, solver)
    objective = float(totals(options)["objective"])
    # The solver's sums differ from ours in the last digits; a bound above the objective would be a gap below 0.
    bound = min(bound, objective)
    gap = (objective - bound) / objective if objective > 0 else 0.0
    return Solution(options, objective, bound, gap, solver)


def _check_scores(groups: Sequence[Group]) -> None:
    for group in groups:
        for option in group.options:
            if math.isnan(option.score):
                raise ArtefactError(
                    f"{group.name}: {option.choice} has no score by this signal; measure it with --mode exact, for the "
                    "signal 'proxy' with --first-order"
                )


def _check(options: Sequence[Option], budgets: Sequence[Budget], solver: str) -> None:
    """Re-checks the rounded plan in plain Python, in the budgets' own units."""
    for budget in budgets:
        used = sum(option.cost(budget.cost) for option in options)
        if used > budget.limit * (1 + 2 * _FEASIBILITY):
            raise BudgetError(
                f"{solver} broke the budget {budget.label}: {budget.shown(used)} of {budget.shown(budget.limit)}; "
                "use --solver HIGHS or change the budget slightly"
            )


def _solve_binary(groups: Sequence[Group], budgets: Sequence[Budget], solver: Solver) -> tuple[list[int], float]:
    import cvxpy as cp

    width = max(len(group.options) for group in groups)
    present = np.zeros((len(groups), width))
    score = np.zeros_like(present)
    costs = [np.zeros_like(present) for _ in budgets]
    for row, group in enumerate(groups):
        for column, option in enumerate(group.options):
            present[row, column], score[row, column] = 1.0, option.score
            for table, budget in zip(costs, budgets, strict=True):
                table[row, column] = option.cost(budget.cost) / budget.limit if budget.limit else 0.0
    # A flat scale keeps tiny scores (8 bits) from vanishing under the solvers' absolute tolerances.
    unit = float(score.max()) or 1.0
    chosen = cp.Variable(present.shape, boolean=True)
    limits = [cp.sum(cp.multiply(table, chosen)) <= 1.0 for table in costs]
    rows = [cp.sum(cp.multiply(present, chosen), axis=1) == 1, chosen <= present]
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(score / unit, chosen))), [*rows, *limits])
    if solver == "HIGHS":
        problem.solve(
            solver=cp.HIGHS, mip_rel_gap=0.0, mip_abs_gap=0.0, mip_feasibility_tolerance=_FEASIBILITY
        )
    else:
        problem.solve(solver=cp.ECOS_BB)
    if problem.status not in ("optimal", "optimal_inaccurate"):
        raise BudgetError(
            f"the budgets {' and '.join(budget.label for budget in budgets)} cannot be met together "
            f"({solver}: {problem.status}); raise one of them, or unpin layers"
        )
    picks = np.argmax(np.where(present > 0, np.asarray(chosen.value), -1.0), axis=1).tolist()
    if solver == "HIGHS":
        # cvxpy annotates the statistics as a dict; HiGHS's are its own HighsInfo object.
        return picks, float(getattr(problem.solver_stats.extra_stats, "mip_dual_bound")) * unit  # noqa: B009
    return picks, _relaxation(score / unit, present, costs) * unit


def _relaxation(score: np.ndarray, present: np.ndarray, costs: Sequence[np.ndarray]) -> float:
    """Optimum of the linear relaxation: a lower bound for solvers that prove none."""
    import cvxpy as cp

    part = cp.Variable(score.shape, nonneg=True)
    limits = [cp.sum(cp.multiply(table, part)) <= 1.0 for table in costs]
    rows = [cp.sum(cp.multiply(present, part), axis=1) == 1, part <= present]
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(score, part))), [*rows, *limits])
    problem.solve(solver=cp.HIGHS)
    return float(problem.value)


def greedy_demotion(groups: Sequence[Group], budgets: Sequence[Budget]) -> Solution | None:
    """QVLA's Algorithm 1 on groups of layers: from the most bits down, the smallest loss per saved bit first.

    Its ratio of Eq. (8) divides by the bits of one channel; here by the bits that the whole group saves, because
    layers differ in size. Steps go to the next lower number of bits only (to the best choice that has it) and stop as
    soon as every budget is met; None when they run out before. No optimality is claimed: bound 0.
    """
    ladders = [ladder(group) for group in groups]
    position = [0] * len(groups)
    heap: list[tuple[float, int, int]] = []

    def push(index: int) -> None:
        here, below = ladders[index][position[index]], position[index] + 1
        if below < len(ladders[index]):
            lower = ladders[index][below]
            heapq.heappush(heap, ((lower.score - here.score) / (here.code_bits - lower.code_bits), index, below))

    for index in range(len(groups)):
        push(index)

    def current() -> list[Option]:
        return [ladder[place] for ladder, place in zip(ladders, position, strict=True)]

    while any(sum(option.cost(budget.cost) for option in current()) > budget.limit for budget in budgets):
        if not heap:
            return None
        _, index, below = heapq.heappop(heap)
        position[index] = below
        push(index)
    options = tuple(current())
    return Solution(options, float(totals(options)["objective"]), 0.0, 1.0, "GREEDY")
