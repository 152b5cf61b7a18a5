"""From a sensitivity table and budgets to a plan, and to the whole trade-off between size and score."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from calibrator.allocation.options import (
    Budget,
    Group,
    LatencyTable,
    Pin,
    added_bits,
    build_groups,
    offered,
    totals,
    weight_bits,
)
from calibrator.allocation.plan import Plan, PlanSize
from calibrator.allocation.solve import Solution, Solver, feasible_range, greedy_demotion, solve
from calibrator.sensitivity.table import Objective, Sensitivity
from vla_policy.core.errors import BudgetError
from vla_policy.core.files import write_json
from vla_policy.core.formats import FULL, Choice, Rounding
from vla_policy.core.targets import Target, find_target, no_kernel

FRONTIER = "frontier"
_GB_BITS = 8e9


@dataclass(frozen=True)
class Limits:
    """Budgets as a user states them; None leaves one out.

    size_gb: 1e9 bytes, everything in the engine. bitops_ratio: part of the 16-bit policy's. latency_ms: per action.
    """

    average_bits: float | None = None
    size_gb: float | None = None
    bitops_ratio: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class PlanRequest:
    """Everything that shapes a plan besides the table."""

    limits: Limits
    objective: Objective = field(default_factory=Objective)
    pins: tuple[Pin, ...] = ()
    solver: Solver = "HIGHS"
    float_bits: int = 16
    latency: LatencyTable | None = None
    target: str | None = None

    @property
    def backend(self) -> str | None:
        """What the latencies were measured with, where there are any."""
        return None if self.latency is None else self.latency.backend

    @property
    def machine(self) -> Target | None:
        """What says which formats are legal: the target, by the backend that the latency table was measured with.

        Raises ArtefactError for a name that is no target, and for a backend that it does not have.
        """
        target = self.target or (None if self.latency is None else self.latency.target)
        return find_target(target).on(self.backend) if target else None


@dataclass(frozen=True)
class Planner:
    """A sensitivity table and a request, ready to be solved for one budget or many."""

    sensitivity: Sensitivity
    request: PlanRequest
    groups: tuple[Group, ...]

    @staticmethod
    def of(sensitivity: Sensitivity, request: PlanRequest) -> "Planner":
        """Raises BudgetError for pins that cannot hold and for what a table was not screened for, ArtefactError for a
        latency table that lacks a layer."""
        _check_screened(sensitivity, request)
        groups = build_groups(
            sensitivity, request.objective, request.pins, request.float_bits, request.latency, request.machine
        )
        return Planner(sensitivity, request, tuple(groups))

    @property
    def params(self) -> int:
        """Weights of the planned layers."""
        return sum(unit.params for unit in self.sensitivity.units)

    @property
    def unquantized_bits(self) -> int:
        return self.sensitivity.unquantized_params * self.request.float_bits

    def budgets(self) -> list[Budget]:
        """The request's limits as rows of Eq. (14c), (14d). Raises BudgetError when none is given."""
        limits, rows = self.request.limits, []
        if limits.average_bits is not None:
            rows.append(Budget("code_bits", limits.average_bits * self.params, "average bits", self.params))
        if limits.size_gb is not None:
            # Only the layers' part can be chosen; what is not quantized is taken off first.
            room = limits.size_gb * _GB_BITS - self.unquantized_bits
            if room <= 0:
                floor = self.unquantized_bits / _GB_BITS
                raise BudgetError(
                    f"size {limits.size_gb:.4g} GB is below the {floor:.4g} GB of tensors that are not quantized"
                )
            rows.append(Budget("size_bits", room, "size of quantized layers in GB", _GB_BITS))
        if limits.bitops_ratio is not None:
            full = self._full_bitops()
            rows.append(Budget("bitops", limits.bitops_ratio * full, "BitOps ratio", full))
        if limits.latency_ms is not None:
            rows.append(self._latency_budget(limits.latency_ms))
        if not rows:
            raise BudgetError("no budget given; choose --average-bits, --size-gb, --bitops-ratio or --latency-ms")
        return rows

    def _latency_budget(self, limit_ms: float) -> Budget:
        if self.request.latency is None:
            raise BudgetError("--latency-ms needs --latency-table; engine_build bench writes one on the target")
        room_ms = limit_ms - self.request.latency.fixed_ms
        if room_ms <= 0:
            fixed_ms = self.request.latency.fixed_ms
            raise BudgetError(f"latency {limit_ms:.4g} ms is below the {fixed_ms:.4g} ms that no plan can change")
        return Budget("latency_ms", room_ms, "latency of planned layers in ms")

    def _full_bitops(self) -> float:
        return float(sum(unit.macs for unit in self.sensitivity.units) * 16 * 16)

    def ranges(self, budgets: Sequence[Budget]) -> dict[str, dict[str, float]]:
        """Feasible range of every budget under the pins, in the budget's shown unit, and the limit itself."""
        shown = {}
        for budget in budgets:
            low, high = feasible_range(self.groups, budget)
            shown[budget.label] = {
                "minimum": low / budget.scale,
                "maximum": high / budget.scale,
                "limit": budget.limit / budget.scale,
            }
        return shown

    def plan(self) -> Plan:
        """The optimal plan within the request's budgets, compared with QVLA's greedy demotion on the same table."""
        budgets = self.budgets()
        solution = solve(self.groups, budgets, self.request.solver)
        greedy = greedy_demotion(self.groups, budgets)
        return self._as_plan(solution, greedy, budgets)

    def _as_plan(self, solution: Solution, greedy: Solution | None, budgets: Sequence[Budget]) -> Plan:
        request, sums = self.request, totals(solution.options)
        limits = request.limits
        details: dict[str, Any] = {
            "parents": {
                "sensitivity_sha256": self.sensitivity.sha256,
                "policy_sha256": self.sensitivity.policy_sha256,
                "calibration_sha256": self.sensitivity.calibration_sha256,
            },
            "conventions": self.sensitivity.conventions,
            "signal": request.objective.signal,
            "pins": [str(pin) for pin in request.pins],
            "kept": [name for name in self.sensitivity.kept if not any(pin.matches(name) for pin in request.pins)],
            "float_bits": request.float_bits,
            "not_offered_by_target": [str(choice) for choice in self._not_offered()],
            "average_bits_budget": limits.average_bits,
            "size_budget_bits": None if limits.size_gb is None else round(limits.size_gb * _GB_BITS),
            "bitops_budget": None if limits.bitops_ratio is None else limits.bitops_ratio * self._full_bitops(),
            "latency_budget_ms": limits.latency_ms,
            "latency_threads": None if request.latency is None else request.latency.threads,
            "screened": None if self.sensitivity.screened is None else dict(self.sensitivity.screened),
            "no_kernel": self._no_kernel(solution),
            "other_rounding": self._other_rounding(solution),
            "memory_only": self._memory_only(solution),
            "below_floor": self._below_floor(solution),
            "feasible": self.ranges(budgets),
            "greedy": None if greedy is None else _comparison(greedy, solution),
        }
        fixed_ms = request.latency.fixed_ms if request.latency else None
        return Plan(
            assignment=self._assignment(solution),
            input_peaks=self._input_peaks(solution),
            policy_sha256=self.sensitivity.policy_sha256,
            alpha=request.objective.alpha,
            beta=request.objective.beta,
            objective=solution.objective,
            bound=solution.bound,
            gap=solution.gap,
            solver=solution.solver,
            average_bits=sums["code_bits"] / self.params,
            size=self._size(solution),
            bitops=int(sums["bitops"]),
            latency_ms=None if fixed_ms is None else fixed_ms + sums["latency_ms"],
            target=request.machine.name if request.machine else None,
            backend=request.backend,
            scored_by={runs: measured for runs, measured in self._offered().items() if runs != measured},
            details=details,
        )

    def _assignment(self, solution: Solution) -> dict[str, Choice]:
        by_unit = {
            unit: option.choice
            for group, option in zip(self.groups, solution.options, strict=True)
            for unit in group.units
        }
        return {unit.name: by_unit[unit.name] for unit in self.sensitivity.units}

    def _offered(self) -> dict[Choice, Choice]:
        """To layers of any kind."""
        found: dict[Choice, Choice] = {}
        for kind in sorted({unit.kind for unit in self.sensitivity.units}):
            found |= offered(self.sensitivity.choices, self.request.machine, kind)
        return dict(sorted(found.items(), key=lambda item: item[0].precision))

    def _not_offered(self) -> list[Choice]:
        """Measured choices that no layer can have on the target."""
        used = set(self._offered().values())
        return [choice for choice in self.sensitivity.choices if choice not in used]

    def _no_kernel(self, solution: Solution) -> dict[str, str]:
        """Choices of the plan that no engine can have, and why."""
        return no_kernel(dict.fromkeys(self._assignment(solution).values()), self.request.target)

    def _memory_only(self, solution: Solution) -> list[str]:
        """Choices of the plan that the target's first backend runs no faster than 16 bits."""
        there = self.request.machine
        used = dict.fromkeys(self._assignment(solution).values())
        return [str(choice) for choice in used if there is not None and there.memory_only(choice.format)]

    def _other_rounding(self, solution: Solution) -> dict[str, str]:
        """Choices of the plan whose activations the target rounds by another rule than they were scored by."""
        scored_by, there = self._offered(), self.request.machine
        if there is None:
            return {}
        found = {}
        for choice in dict.fromkeys(self._assignment(solution).values()):
            scored, runs = self.sensitivity.rounding(scored_by[choice].format), there.rounding(choice.format)
            if runs is not None and runs is not scored:
                found[str(choice)] = f"scored {scored.value}, {there.name} rounds {runs.value}"
        return found

    def _input_peaks(self, solution: Solution) -> dict[str, float]:
        """Of layers whose input the target rounds with a fixed scale, as far as the table knows them."""
        there, peaks = self.request.machine, self.sensitivity.input_peaks
        fixed = {
            name
            for name, choice in self._assignment(solution).items()
            if there is not None and there.rounding(choice.format) is Rounding.TENSOR
        }
        return {name: peak for name, peak in peaks.items() if name in fixed}

    def _below_floor(self, solution: Solution) -> list[str]:
        """Layers whose planned score is not above the noise floor, full precision aside: nothing was seen there."""
        if self.request.objective.signal != "evidence":
            return []
        scored_by, floor = self._offered(), self.sensitivity.noise_floor
        units = {unit.name: unit for unit in self.sensitivity.units}
        return [
            name
            for name, choice in self._assignment(solution).items()
            if choice != FULL and units[name].omega[scored_by[choice]] <= floor
        ]

    def _size(self, solution: Solution) -> PlanSize:
        chosen, units = self._assignment(solution), self.sensitivity.units
        return PlanSize(
            weight_bits=sum(weight_bits(u, chosen[u.name].format, self.request.float_bits) for u in units),
            scale_bits=sum(added_bits(unit.outputs, unit.inputs, chosen[unit.name]) for unit in units),
            unquantized_bits=self.unquantized_bits,
        )

    def frontier(self, points: int) -> list[dict[str, Any]]:
        """The best score at evenly spaced sizes of the planned layers, smallest first, with greedy's beside it."""
        low, high = feasible_range(self.groups, Budget("size_bits", 0.0, "size"))
        curve = []
        for limit in tqdm(np.linspace(low, high, points), desc="frontier", unit="plan", disable=None):
            budgets = [Budget("size_bits", float(limit), "size")]
            solution = solve(self.groups, budgets, self.request.solver)
            greedy = greedy_demotion(self.groups, budgets)
            sums = totals(solution.options)
            layers = Counter(map(str, self._assignment(solution).values()))
            curve.append(
                {
                    "size_bits": int(sums["size_bits"]) + self.unquantized_bits,
                    "average_bits": sums["code_bits"] / self.params,
                    "bitops": int(sums["bitops"]),
                    "objective": solution.objective,
                    "gap": solution.gap,
                    "greedy_objective": None if greedy is None else greedy.objective,
                    "layers_by_choice": dict(layers),
                }
            )
        return curve


def _check_screened(sensitivity: Sensitivity, request: PlanRequest) -> None:
    """Raises BudgetError for anything but what a screened table was screened for: there scores may be rough estimates
    just where they decide."""
    screened = sensitivity.screened
    if screened is None:
        return
    limits, wanted = request.limits, Objective(screened["alpha"], screened["beta"])
    kinds = {unit.kind for unit in sensitivity.units}
    runs = [set(offered(sensitivity.choices, request.machine, kind)) for kind in kinds]
    asked = {
        "budgets other than the average bits it was screened for": limits
        != Limits(average_bits=limits.average_bits)
        or limits.average_bits not in screened["targets"],
        "another objective": request.objective != wanted,
        "pins": bool(request.pins),
        "a target that runs other formats": any(choices != set(sensitivity.choices) for choices in runs),
    }
    for what, differs in asked.items():
        if differs:
            targets = ", ".join(f"{target:g}" for target in screened["targets"])
            raise BudgetError(
                f"{sensitivity.path}: was screened for plans of {targets} bits on average with alpha {wanted.alpha:g} "
                f"and beta {wanted.beta:g}; it does not serve {what}: measure with --mode exact, or screen for it "
                "(sensitivity --targets)"
            )


def _comparison(greedy: Solution, solution: Solution) -> dict[str, Any]:
    above = (greedy.objective - solution.objective) / solution.objective if solution.objective > 0 else 0.0
    return {"objective": greedy.objective, "above_optimum": above}


def write_frontier(path: Path, planner: Planner, points: int) -> None:
    """Writes the trade-off curve as an artefact of kind `frontier`. Raises BudgetError for a screened table."""
    if planner.sensitivity.screened is not None:
        raise BudgetError(f"{planner.sensitivity.path}: was screened for few budgets; a curve needs --mode exact")
    objective = planner.request.objective
    write_json(
        path,
        {
            "schema_version": 1,
            "kind": FRONTIER,
            "parents": {
                "sensitivity_sha256": planner.sensitivity.sha256,
                "policy_sha256": planner.sensitivity.policy_sha256,
            },
            "alpha": objective.alpha,
            "beta": objective.beta,
            "signal": objective.signal,
            "pins": [str(pin) for pin in planner.request.pins],
            "solver": planner.request.solver,
            "points": planner.frontier(points),
        },
    )
