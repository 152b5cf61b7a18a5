"""python -m calibrator: from recordings to a bit plan and its report."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from vla_policy.core.cli import run
from vla_policy.core.errors import BudgetError, VlaError
from vla_policy.core.instruction import normalised

if TYPE_CHECKING:
    from calibrator.conventions.deciders import Decider
    from calibrator.data.calibration import CalibrationSet
    from vla_policy.core.formats import Choice

_WEIGHT_ONLY = ("w2a16", "w4a16", "w8a16")
_WITH_ACTIVATIONS = ("w2a8", "w4a8", "w8a8")


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("python -m calibrator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_collect(commands.add_parser("collect", help="recordings -> calibration set", formatter_class=formatter))
    _add_sensitivity(
        commands.add_parser("sensitivity", help="policy + calibration set -> scores", formatter_class=formatter)
    )
    _add_check(commands.add_parser("check", help="are states as the policy knows them?", formatter_class=formatter))
    _add_allocate(commands.add_parser("allocate", help="scores + budget -> bit plan", formatter_class=formatter))
    _add_transform(
        commands.add_parser("transform", help="policy -> policy that is easier to round", formatter_class=formatter)
    )
    _add_quantize(commands.add_parser("quantize", help="policy + bit plan -> codes", formatter_class=formatter))
    for name, (_, text) in _ELSEWHERE.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _add_collect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        help="rosbag2 recordings, LeRobot (v3.0, v2.1) or RLDS data sets, LIBERO HDF5, folders of demo.collect",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the calibration set")
    parser.add_argument(
        "--samples", type=int, default=32, help="number of states; 32 give each of sensitivity's 5 phases some 6"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice")
    parser.add_argument("--contract", type=Path, help="topic contract (YAML), needed for bags; it is their layout")
    parser.add_argument("--namespace", default="", help="ROS namespace of the bag's relative topics")
    _add_layout(parser)


    group = parser.add_argument_group("check", "with a policy, its decisions on the states against recorded actions")
    group.add_argument("--policy", type=Path, help="policy folder")
    group.add_argument("--unnorm-key", help="action statistics, needed when the policy has several")
    _add_accept(group)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compares the policy's own decisions on recorded states with the recorded actions, as they are and with images "
        "turned, mirrored or in other colours, other statistics, another order or sign. Exit code 2 where another "
        "convention fits clearly better. sensitivity does so too, and its report shows the table as a picture."
    )
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--policy", type=Path, help="policy folder")
    who.add_argument("--engine", type=Path, help="engine folder instead, e.g. on the robot with a bag of its own")
    parser.add_argument("--calibration", type=Path, required=True, help="calibration set with recorded actions")
    parser.add_argument("--unnorm-key", help="action statistics, needed when the policy has several")
    parser.add_argument("--device", default="cpu", help="where the policy runs: cpu, cuda, cuda:1, ...")
    _add_accept(parser)


def _add_accept(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--accept-conventions", action="store_true", help="go on where another convention fits clearly better"
    )


def _add_layout(parser: argparse.ArgumentParser) -> None:
    """What of a record the policy sees; nothing given means what the source itself says."""
    group = parser.add_argument_group("layout", "what of a record the policy sees, in the source's own names")
    group.add_argument("--layout", metavar="PRESET", help="a published set's; what is given besides replaces its parts")
    group.add_argument("--camera", nargs="+", help="images, in the policy's order")
    group.add_argument(
        "--state", nargs="*", help="parts of the state, joined in this order, e.g. 'observation.state[0:6]'"
    )
    group.add_argument("--action", help="recorded actions, which the policy's own are checked against")
    group.add_argument("--task", help="text that holds the task")
    group.add_argument("--instruction", type=normalised, help="task, where a record tells none")
    group.add_argument(
        "--rotate", nargs="+", type=int, choices=(0, 180), help="degrees by which stored images are turned, one or each"
    )
    group.add_argument(
        "--crop-area", nargs="+", type=float, metavar="PART", help="centre that is kept, part in (0, 1], one or each"
    )
    group.add_argument("--colours", choices=("rgb", "bgr"), help="order of stored colours")
    group.add_argument(
        "--gripper", choices=("same", "opposite"), help="sense of the recorded gripper, against the policy's"
    )


def _add_sensitivity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", type=Path, required=True, help="policy folder")
    parser.add_argument("--calibration", type=Path, required=True, help="calibration set")
    parser.add_argument("--out", type=Path, required=True, help="sensitivity.json to write")
    parser.add_argument(
        "--choices",
        nargs="+",
        metavar="CHOICE",
        help="what every layer is measured in: bits of weights and activations, inputs per weight scale (none: one "
        "scale per output channel), rounding method, e.g. w16a16 w8a8 w4a8_g32 w4a16_g64:gptq; w16a16 is the "
        "reference and always offered; default: w2a16_g64 w4a16_g64 w8a16_g64, of a --target those that it runs, 8-bit "
        "activations too. Formats without a kernel can be measured and are marked so",
    )
    parser.add_argument("--target", help="machine whose kernels say how activations are rounded; default: per token")
    parser.add_argument("--kappa", type=float, default=0.1, help="temperature of the soft bottleneck, Eq. (9)")
    parser.add_argument(
        "--lambda", dest="attribution_weight", type=float, default=1.0, help="weight of attribution, Eq. (8)"
    )
    parser.add_argument(
        "--bins",
        type=int,
        default=5,
        help="phases of a trajectory, Eq. (12): Omega_tau is the largest of their means, so each wants some 6 states "
        "or one state sets it; 5 give 32 states that",
    )
    parser.add_argument("--epsilon", type=float, default=1e-12, help="added to evidence in Eqs. (6), (7)")
    parser.add_argument("--language-block", type=int, help="decoder block whose input is a boundary; default the last")
    parser.add_argument("--unnorm-key", help="action statistics, needed when the policy has several")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="how weights are held; bfloat16 takes half the memory and about a quarter more time, and loses nothing of "
        "a checkpoint in bfloat16: activations, gradients and losses are float32 either way",
    )
    parser.add_argument("--device", default="cpu", help="where the policy runs: cpu, cuda, cuda:1, ...")
    parser.add_argument("--batch-size", type=int, default=16, help="states per pass")
    parser.add_argument("--threads", type=int, help="torch threads; default 1 below 0.1 B parameters, all cores above")
    _add_accept(parser)
    parser.add_argument("--units", nargs="+", default=["*"], help="only layers whose names match these globs")
    parser.add_argument(
        "--mode",
        choices=("exact", "screened"),
        default="exact",
        help="screened: exact only where a plan of --targets is undecided, corrected first-order scores elsewhere; "
        "allocate then takes these budgets only",
    )
    parser.add_argument("--targets", type=float, nargs="+", default=[3.0, 4.0, 6.0], help="screened: average bits")
    parser.add_argument("--cap", type=float, default=0.1, help="screened: largest part of all exact evaluations")
    parser.add_argument(
        "--first-order",
        action="store_true",
        help="also estimate the action error to first order, for allocate --signal proxy; screened does in any case",
    )
    parser.add_argument("--executor", choices=("local", "ray"), default="local")
    parser.add_argument("--ray-address", help="address of a running Ray cluster; default: one on this machine")
    parser.add_argument("--cpus-per-task", type=int, default=1, help="CPU cores of a Ray task")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue an unfinished run and keep a finished one; --no-resume discards both",
    )


def _add_allocate(parser: argparse.ArgumentParser) -> None:
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


def _add_transform(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", type=Path, required=True, help="policy folder")
    parser.add_argument("--calibration", type=Path, required=True, help="calibration set")
    parser.add_argument(
        "--method",
        metavar="RECIPE",
        default="smoothquant",
        help="e.g. 'smoothquant(strength=0.7)', 'awq(bits=3,group=64)' or, for pi0.5, 'quantvla(weight_bits=4)'",
    )
    parser.add_argument("--unnorm-key", help="statistics of the calibration set's states, if the policy has several")
    parser.add_argument("--out", type=Path, required=True, help="policy folder to write")


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", type=Path, required=True, help="policy folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", type=Path, help="plan.json made for this policy")
    what.add_argument("--uniform", metavar="CHOICE", help="every layer the same, e.g. w4a16_g64:mse")
    parser.add_argument("--method", metavar="RECIPE", help="rounding in place of the plan's, e.g. 'mse(steps=128)'")
    parser.add_argument("--calibration", type=Path, help="calibration set, for methods that look at a layer's input")
    parser.add_argument("--unnorm-key", help="statistics of the calibration set's states, if the policy has several")
    parser.add_argument("--out", type=Path, required=True, help="folder of the codes; a stopped run continues there")


def _collect(args: argparse.Namespace) -> int:
    from calibrator.data.calibration import CALIBRATION, CalibrationSet, collect
    from calibrator.data.layout import RecordLayout
    from calibrator.data.sources import open_sources
    from vla_policy.core.contract import load_contract
    from vla_policy.core.left_out import LeftOut, told
    from vla_policy.core.outputs import check_folder

    check_folder(args.out, CALIBRATION, [*args.sources, args.contract])
    contract = load_contract(args.contract) if args.contract else None
    layout = RecordLayout.named(
        args.layout,
        cameras=args.camera,
        state=args.state,
        action=args.action,
        task=args.task,
        instruction=args.instruction,
        rotation=args.rotate,
        crop_area=args.crop_area,
        colours=args.colours,
        gripper=args.gripper,
    )
    sources = open_sources(args.sources, contract, args.namespace, layout)

    def judge(states: CalibrationSet) -> None:
        print(_conventions(args, states))

    content = collect(sources, args.out, args.samples, args.seed, judge if args.policy else None)
    for source in content["sources"]:
        reasons = told(LeftOut(**item) for item in source["left_out"])
        print(f"{source['path']}: {source['trajectories']} trajectories; left out: {reasons}")
        for note in source["notes"]:
            print(f"note: {note}")
    print(f"{args.out}: {len(content['samples'])} states")
    return 0


def _conventions(args: argparse.Namespace, states: "CalibrationSet") -> str:
    """The outcome of the check in words. Raises DataError where it is refused."""
    from calibrator.conventions.check import check
    from calibrator.conventions.table import table

    outcome = check(_decider(args), states, args.unnorm_key)
    if outcome.trials:
        print(table(outcome))
    return outcome.require(args.accept_conventions, "--accept-conventions").summary


def _decider(args: argparse.Namespace) -> "Decider":
    """The policy, or the engine that `check` was given in its place: that needs no torch."""
    from calibrator.conventions.deciders import EngineDecider, PolicyDecider

    if getattr(args, "engine", None):
        return EngineDecider(args.engine)
    from calibrator.families import load_policy

    return PolicyDecider(load_policy(args.policy, device=getattr(args, "device", "cpu")), args.policy)


def _check(args: argparse.Namespace) -> int:
    from calibrator.data.calibration import load_calibration

    print(_conventions(args, load_calibration(args.calibration)))
    return 0


def _sensitivity(args: argparse.Namespace) -> int:
    from calibrator.sensitivity.measure import measure
    from calibrator.sensitivity.run import RunOptions
    from calibrator.sensitivity.scores import ScoreSettings
    from calibrator.sensitivity.screening import ScreenSettings
    from calibrator.sensitivity.sweep import SweepSettings, SweepSpec
    from vla_policy.core.formats import FULL

    choices = tuple(choice for choice in _choices(args) if choice != FULL)
    settings = SweepSettings(choices, args.language_block, args.epsilon, args.dtype, args.unnorm_key, args.target)
    spec = SweepSpec(str(args.policy), str(args.calibration), settings, args.batch_size, args.device)
    screen = ScreenSettings(tuple(args.targets), args.cap)
    options = RunOptions(
        executor=args.executor,
        ray_address=args.ray_address,
        cpus_per_task=args.cpus_per_task,
        resume=args.resume,
        unit_globs=tuple(args.units),
        screen=screen if args.mode == "screened" else None,
        first_order=args.first_order,
        threads=args.threads,
        accept_conventions=args.accept_conventions,
    )
    result = measure(spec, args.out, ScoreSettings(args.kappa, args.attribution_weight, args.bins), options)
    low = result.choices[0]
    worst = sorted(result.units, key=lambda unit: -unit.omega[low])[:3]
    print(f"{args.out}: {len(result.units)} layers in {', '.join(map(str, settings.choices))}")
    print(f"most fragile in {low}: " + ", ".join(f"{unit.name} {unit.omega[low]:.3f}" for unit in worst))
    print(f"note: {result.meta['conventions']['summary']}")
    if facts := result.screened:
        print(
            f"screened: {facts['evaluations']} of {facts['exhaustive_evaluations']} evaluations, the other scores are "
            f"estimates; {facts['reason']}"
        )
    for choice, reason in result.meta["no_kernel"].items():
        print(f"note: {choice} has no kernel ({reason}); an engine cannot have it")
    if below := result.meta["below_floor"]:
        count = sum(len(entry["choices"]) for entry in below)
        print(f"note: {count} scores are not above the noise floor, {result.noise_floor:.2g}: nothing was seen there")
    if strays := result.meta["stray_states"]:
        print(f"note: in {strays} of the states the policy prefers a token that is no action")
    if result.meta["inversions"]:
        count = len(result.meta["inversions"])
        print(f"note: {count} times the more precise of two choices scored worse; use more states if it matters")
    return 0


def _choices(args: argparse.Namespace) -> tuple["Choice", ...]:
    """What was asked for, or what is usually worth measuring."""
    from calibrator.quantizers import parse_choices
    from vla_policy.core.targets import find_target

    target = find_target(args.target) if args.target else None
    if args.choices or target is None:
        return parse_choices(args.choices or [f"{bare}_g64" for bare in _WEIGHT_ONLY])
    legal = {str(fmt) for fmt in target.legal()}
    wanted = [[f"{bare}_g64", bare] for bare in (*_WEIGHT_ONLY, *_WITH_ACTIVATIONS)]
    return parse_choices([name for names in wanted for name in [n for n in names if n in legal][:1]])


def _allocate(args: argparse.Namespace) -> int:
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
    for runs, measured in plan.fallbacks.items():
        print(f"note: {plan.target} has no kernel for {measured}; such layers run as {runs}, scored by {measured}")
    for choice, reason in plan.details["no_kernel"].items():
        print(f"note: {choice} has no kernel ({reason}); no engine can be built from this plan")
    for choice, rules in plan.details["other_rounding"].items():
        print(f"note: activations of {choice}: {rules}; measure with --target {plan.target}")
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


def _quantize(args: argparse.Namespace) -> int:
    from calibrator.quantize import QuantizeRequest, quantize
    from calibrator.quantizers import parse_choice

    uniform = parse_choice(args.uniform) if args.uniform else None
    states = args.calibration, args.unnorm_key
    store = quantize(QuantizeRequest(args.policy, args.out, args.plan, uniform, args.method, *states))
    counts = Counter(map(str, store.identity.choices.values()))
    print(f"{args.out}: " + ", ".join(f"{count} x {choice}" for choice, count in sorted(counts.items())))
    return 0


def _transform(args: argparse.Namespace) -> int:
    from calibrator.transform import TransformRequest, transform

    request = TransformRequest(args.policy, args.calibration, args.out, args.method, args.unnorm_key)
    print(f"{args.out}: {args.method}: {transform(request)}")
    return 0


_COMMANDS = {
    "collect": _collect,
    "check": _check,
    "sensitivity": _sensitivity,
    "allocate": _allocate,
    "quantize": _quantize,
    "transform": _transform,
}


# Commands whose options belong to their own modules, which also answer `--help`.
_ELSEWHERE = {
    "import-oft": ("calibrator.families.openvla_oft.published", "OpenVLA-OFT checkpoint -> policy folder"),
    "import-pi05": ("calibrator.families.pi05.published", "pi0.5 checkpoint of openpi or lerobot -> policy folder"),
    "report": ("calibrator.report", "scores + plan -> one HTML file"),
}


def _elsewhere(command: str) -> Callable[[Sequence[str]], int]:
    try:
        main: Callable[[Sequence[str]], int] = import_module(_ELSEWHERE[command][0]).main
    except ImportError as error:
        raise VlaError(f"{command} needs {error.name}; install the project again") from error
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        if arguments and arguments[0] in _ELSEWHERE:
            return _elsewhere(arguments[0])(arguments[1:])
        args = _parser().parse_args(arguments)
        return _COMMANDS[args.command](args)

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
