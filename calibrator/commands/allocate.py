"""`allocate`: scores + budget -> bit plan."""

import argparse
from pathlib import Path

from vla_policy.core.backends.base import MEMORY_ONLY
from vla_policy.core.errors import BudgetError


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sensitivity", type=Path, required=True, help="sensitivity.json")
    parser.add_argument("--out", type=Path, required=True, help="plan.json to write")
    parser.add_argument("--average-bits", type=float, help="budget: mean weight bits of the planned layers")
    parser.add_argument("--size-gb", type=float, help="budget: everything in the engine, 1e9 bytes")
    parser.add_argument("--bitops-ratio", type=float, help="budget: part of the 16-bit policy's BitOps")
    parser.add_argument("--latency-ms", type=float, help="budget: milliseconds per action, by --latency-table")
    parser.add_argument("--latency-table", type=Path, help="cost table that engine_build measured on the target")
    parser.add_argument("--alpha", type=float, default=0.75, help="weight of Omega, Eq. (14a)")
    parser.add_argument("--beta", type=float, default=0.25, help="weight of Omega_tau, Eq. (14a)")
    parser.add_argument(
        "--signal",
        choices=("evidence", "action", "proxy"),
        default="evidence",
        help="what is minimised: Mix-QVLA's scores, QVLA's action error, or its first-order estimate",
    )
    parser.add_argument("--solver", choices=("HIGHS", "ECOS_BB"), default="HIGHS")
    parser.add_argument("--pin", nargs="*", default=[], metavar="GLOB=CHOICE", help="layers with a fixed choice")
    parser.add_argument("--float-bits", type=int, choices=(16, 32), default=16, help="width of unquantized tensors")
    parser.add_argument("--target", help="name of the device the plan is for")
    parser.add_argument("--frontier", type=Path, help="also write the whole trade-off curve to this JSON")
    parser.add_argument("--frontier-points", type=int, default=33, help="sizes on the curve")


def run(args: argparse.Namespace) -> int:
    from calibrator.allocation.options import LatencyTable, Pin
    from calibrator.allocation.plan import KIND as PLAN
    from calibrator.allocation.planning import FRONTIER, Limits, Planner, PlanRequest, write_frontier
    from calibrator.sensitivity.table import Objective, Sensitivity
    from vla_policy.core.outputs import check_file

    check_file(args.out, PLAN, [args.sensitivity, args.latency_table])
    if args.frontier:
        check_file(args.frontier, FRONTIER, [args.sensitivity, args.latency_table, args.out])
    if args.frontier and args.frontier_points < 2:
        raise BudgetError(f"--frontier-points {args.frontier_points}: a curve needs at least 2")
    sensitivity = Sensitivity.load(args.sensitivity)
    table = LatencyTable.load(args.latency_table, sensitivity.policy_sha256) if args.latency_table else None
    request = PlanRequest(
        limits=Limits(args.average_bits, args.size_gb, args.bitops_ratio, args.latency_ms),
        objective=Objective(args.alpha, args.beta, args.signal),
        pins=tuple(Pin.parse(text) for text in args.pin),
        solver=args.solver,
        float_bits=args.float_bits,
        latency=table,
        target=args.target,
    )
    planner = Planner.of(sensitivity, request)
    for label, row in planner.ranges(planner.budgets()).items():
        print(f"{label}: {row['limit']:.4g} of feasible {row['minimum']:.4g} to {row['maximum']:.4g}")
    plan = planner.plan()
    plan.save(args.out)
    print(
        f"{args.out}: {plan.average_bits:.3f} bits on average, {plan.size.total_bits / 8e9:.4g} GB, "
        f"objective {plan.objective:.6g}: {plan.standing} ({plan.solver})"
    )
    if kept := plan.details["kept"]:
        print(f"note: {', '.join(kept)}: kept at 16 bits; --pin NAME=CHOICE gives another choice")
    for runs, measured in plan.fallbacks.items():
        print(f"note: {plan.target} has no kernel for {measured}; such layers run as {runs}, scored by {measured}")
    for choice, reason in plan.details["no_kernel"].items():
        print(f"note: {choice} has no kernel ({reason}); no engine can be built from this plan")
    for choice, rules in plan.details["other_rounding"].items():
        print(f"note: activations of {choice}: {rules}; measure with --target {plan.target}")
    if slow := plan.details["memory_only"]:
        print(f"note: {', '.join(slow)}: {MEMORY_ONLY} on {plan.target}; formats with 8-bit activations save both")
    if below := plan.details["below_floor"]:
        floor = f"{sensitivity.noise_floor:.2g}"
        print(f"note: {len(below)} layers' scores are not above the noise floor, {floor}: their order says nothing")
    greedy = plan.details["greedy"]
    if greedy:
        print(f"QVLA's greedy demotion on the same table: {100 * greedy['above_optimum']:.2f} % above")
    if args.frontier:
        write_frontier(args.frontier, planner, args.frontier_points)
        print(f"{args.frontier}: {args.frontier_points} points")
    return 0
