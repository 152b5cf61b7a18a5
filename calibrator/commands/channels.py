"""`channels`: QVLA, a width for every output channel: `measure` scores them, `allocate` makes the plan."""

import argparse
from pathlib import Path

from calibrator.commands import options

_STAGES = ("vision", "projector", "language", "head")


def add(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", required=True)
    for name, (add_options, _, text) in _STEPS.items():
        formatter = argparse.ArgumentDefaultsHelpFormatter
        add_options(steps.add_parser(name, help=text, description=text, formatter_class=formatter))


def run(args: argparse.Namespace) -> int:
    step: int = _STEPS[args.step][1](args)
    return step


def _add_measure(parser: argparse.ArgumentParser) -> None:
    options.add_policy(parser)
    options.add_calibration(parser)
    parser.add_argument("--out", type=Path, required=True, help="channels.json to write, its scores beside it")
    parser.add_argument(
        "--choices", nargs="+", metavar="CHOICE", default=["w2a16", "w4a16", "w8a16"],
        help="one of each width between 0 and 16 bits; 0 and 16 are always there",
    )  # fmt: skip
    parser.add_argument(
        "--exact", type=float, default=0.01, metavar="PART", help="of all channels that is evaluated exactly"
    )
    options.add_unnorm_key(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="states per pass")
    options.add_device(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="how matrices are held")
    options.add_accept(parser)
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="continue an unfinished run and keep a finished one; --no-resume discards both",
    )  # fmt: skip


def _measure(args: argparse.Namespace) -> int:
    from calibrator.quantizers import parse_choices
    from calibrator.sensitivity.channels import ChannelOptions, measure_channels
    from calibrator.sensitivity.sweep import SweepSettings, SweepSpec

    settings = SweepSettings(parse_choices(args.choices), dtype=args.dtype, unnorm_key=args.unnorm_key)
    spec = SweepSpec(str(args.policy), str(args.calibration), settings, args.batch_size, args.device)
    table = measure_channels(spec, args.out, ChannelOptions(args.exact, args.accept_conventions, args.resume))
    channels = sum(layer.shape.outputs for layer in table.layers)
    exact = f"{table.meta['exact_channels']:,} of them exact"
    print(f"{args.out}: {channels:,} channels of {len(table.layers)} layers, {exact}")
    widths = ("0 bits", *map(str, table.choices))
    told = ", ".join(f"{width} {factor:.2g}" for width, factor in zip(widths, table.factors, strict=True))
    print(f"an exact score is so much of its first-order estimate (median): {told}")
    return 0


def _add_allocate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--channels", type=Path, required=True, help="channels.json")
    parser.add_argument("--out", type=Path, required=True, help="plan.json to write, its rows' widths beside it")
    parser.add_argument("--average-bits", type=float, required=True, help="budget: mean weight bits")
    parser.add_argument(
        "--keep", nargs="*", choices=_STAGES, default=["projector", "head"], metavar="STAGE",
        help="stages whose layers keep 16 bits; none given: no stage",
    )  # fmt: skip
    parser.add_argument(
        "--solver", choices=("HIGHS", "GREEDY"), default="HIGHS",
        help="the certified optimum, or the published greedy demotion",
    )  # fmt: skip
    parser.add_argument(
        "--prune", action=argparse.BooleanOptionalAction, default=True, help="whether channels may have 0 bits"
    )
    parser.add_argument(
        "--as-published", action="store_true",
        help="the average is over the channels of the layers that are not kept, each counting once; otherwise over all "
        "weights, as in `allocate`, so that equal averages are equal bytes",
    )  # fmt: skip


def _allocate(args: argparse.Namespace) -> int:
    from calibrator.allocation.channel_plan import ChannelRequest, plan_channels
    from calibrator.allocation.plan import KIND, rows_path
    from calibrator.quantizers.rows import KIND as ROWS
    from calibrator.sensitivity.channel_table import ChannelTable
    from vla_policy.core.outputs import check_file

    check_file(args.out, KIND, [args.channels])
    check_file(rows_path(args.out), ROWS, [args.channels])
    request = ChannelRequest(args.average_bits, tuple(args.keep), args.solver, args.prune, args.as_published)
    plan = plan_channels(ChannelTable.load(args.channels), request)
    plan.save(args.out)
    widths = ", ".join(f"{count:,} of {bits}" for bits, count in plan.details["channels_by_bits"].items())
    size = f"{plan.size.total_bits / 8e9:.4g} GB"
    print(f"{args.out}: {plan.average_bits:.3f} bits on average, {size}; channels by bits: {widths}")
    if plan.solver == "GREEDY":
        print(f"objective {plan.objective:.6g}: greedy demotion, nothing proven")
    else:
        above = f"{100 * plan.details['greedy']['above_optimum']:.2f} % above"
        print(f"objective {plan.objective:.6g}: {plan.standing}; greedy demotion on the same table: {above}")
    return 0


_STEPS = {
    "measure": (_add_measure, _measure, "policy + calibration set -> channels.json"),
    "allocate": (_add_allocate, _allocate, "channels.json + average bits -> plan whose layers are split by width"),
}
