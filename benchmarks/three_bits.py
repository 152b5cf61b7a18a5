"""Whether 3 bits would pay beside mixes of 2, 4 and 8 at equal bytes: the same budgets, planned with and without them.

    python -m calibrator sensitivity --policy demo/policies/libero_object --calibration C --out table.json \\
        --choices w2a16_g64 w3a16_g64 w4a16_g64 w8a16_g64
    python benchmarks/three_bits.py --sensitivity table.json --policy demo/policies/libero_object

Scales of equal groups are equal bytes in every format, so equal average bits are equal bytes. Two objectives are
planned: the table's evidence (Eq. (14a)), and the squared error of the weights by `--methods`. For each budget: how
many layers take 3 bits, how far the certified optimum without them is above that with them, and how many more bits on
average it takes without them to come as low.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from calibrator.allocation.plan import Plan
from calibrator.allocation.planning import Limits, Planner, PlanRequest
from calibrator.families import live_units, load_policy
from calibrator.quantizers import parse_choice, quantize
from calibrator.sensitivity.table import Objective, Sensitivity
from vla_policy.core.cli import run
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL, Choice

_BITS = 3
_FINE = 0.005


def squared_errors(table: Sensitivity, policy: Path, method: str) -> Sensitivity:
    """The table with |Q(W) - W|^2 / |W|^2, weighted by the layer's size, in place of Omega."""
    modules = {unit.name: unit.module for unit in live_units(load_policy(policy))}

    def left(name: str, choice: Choice) -> float:
        weight = modules[name].weight.detach()
        change = quantize(weight, parse_choice(f"{choice.format}:{method}")).dequantize() - weight
        return float(change.square().sum() / weight.square().mean())

    def scores(name: str) -> dict[Choice, float]:
        return {choice: left(name, choice) for choice in table.choices if choice != FULL} | {FULL: 0.0}

    return replace(table, units=tuple(replace(unit, omega=scores(unit.name)) for unit in table.units))


def plan(table: Sensitivity, objective: Objective, average_bits: float, bits: set[int]) -> Plan:
    """The certified optimum with choices of these widths."""
    choices = tuple(choice for choice in table.choices if choice.format.weight_bits in bits)
    offered = replace(table, choices=choices)
    return Planner.of(offered, PlanRequest(Limits(average_bits=average_bits), objective)).plan()


def compare(title: str, table: Sensitivity, objective: Objective, budgets: Sequence[float]) -> None:
    """Prints a row per budget."""
    every = {choice.format.weight_bits for choice in table.choices}
    print(f"\n| average bits, {title} | layers of 3 bits | objective with | without, above it | worth, bits |")
    print("|---|---|---|---|---|")
    for budget in budgets:
        best, without = (plan(table, objective, budget, bits) for bits in (every, every - {_BITS}))
        layers = sum(choice.format.weight_bits == _BITS for choice in best.assignment.values())
        above = without.objective / best.objective - 1
        worth = _needed(table, objective, best.objective, every - {_BITS}, budget) - budget
        told = f"{layers} of {len(table.units)} | {best.objective:.5g} | {100 * above:.1f} % | {worth:.2f}"
        print(f"| {budget:g} | {told} |", flush=True)


def _needed(table: Sensitivity, objective: Objective, wanted: float, bits: set[int], low: float) -> float:
    """The average bits, from `low` on, with which these widths come as low as `wanted`; to a hundredth."""
    high = float(max(choice.format.weight_bits for choice in table.choices))
    while high - low > _FINE:
        middle = (low + high) / 2
        low, high = (low, middle) if plan(table, objective, middle, bits).objective <= wanted else (middle, high)
    return high


def main(argv: Sequence[str]) -> int:
    """Prints both comparisons."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks/three_bits.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--sensitivity", type=Path, required=True, help="table with choices of 2, 3, 4 and 8 bits")
    parser.add_argument("--policy", type=Path, required=True, help="policy folder")
    parser.add_argument("--methods", nargs="+", default=["rtn", "mse"], help="rounding of the squared errors")
    parser.add_argument("--average-bits", type=float, nargs="+", default=[2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0])
    args = parser.parse_args(argv)
    table = Sensitivity.load(args.sensitivity)
    if _BITS not in {choice.format.weight_bits for choice in table.choices}:
        raise ArtefactError(f"{args.sensitivity}: no choice has 3 bits; measure with --choices w3a16_g64 among them")
    compare("evidence", table, Objective(), args.average_bits)
    for method in args.methods:
        errors = squared_errors(table, args.policy, method)
        compare(f"squared error of {method}", errors, Objective(1.0, 0.0), args.average_bits)
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
