"""Command line: build, verify, inspect, bench, prove."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vla_policy.core.backends import backend_names
from vla_policy.core.cli import run
from vla_policy.core.formats import Format
from vla_policy.core.targets import TARGETS, find_target


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; raises VlaError for what the user can mend."""
    arguments = _parser().parse_args(argv)
    command: int = arguments.command(arguments)
    return command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine_build", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_build(commands.add_parser("build", help="policy and plan -> engine folder"))
    _add_verify(commands.add_parser("verify", help="compare bytes, formats and numbers with the policy's"))
    _add_inspect(commands.add_parser("inspect", help="print what an engine holds"))
    _add_bench(commands.add_parser("bench", help="latency, memory and load time beside the 16-bit engine"))
    _add_prove(commands.add_parser("prove", help="on the device: compile, read back, decide, compare, time, report"))
    return parser


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_build)
    parser.add_argument("--policy", type=Path, required=True, help="policy folder")
    plan = parser.add_mutually_exclusive_group(required=True)
    plan.add_argument("--plan", type=Path, help="plan.json made by `calibrator allocate` for this policy")
    plan.add_argument("--weights", type=Path, help="the plan's codes, made by `calibrator quantize` for this policy")
    plan.add_argument("--uniform", metavar="CHOICE", help="every layer the same, e.g. w16a16 or w4a16_g64:rtn")
    parser.add_argument("--target", choices=TARGETS, default="cpu", help="machine that runs the engine (default: cpu)")
    parser.add_argument(
        "--backend",
        choices=backend_names(),
        help="what runs the engine (default: what the plan's latencies were measured with; else on this machine "
        "onnxruntime_vnni for activations of 8 bits, openvino_bf16 for large policies without; else the first)",
    )
    parser.add_argument("--out", type=Path, required=True, help="engine folder to write; replaced when complete")
    parser.add_argument(
        "--calibration",
        type=Path,
        help="calibration set: its conventions are checked, TensorRT's w8a8 takes its scales unless the plan has them",
    )
    _add_unnorm_key(parser, "which of the policy's statistics the calibration set's states are normalised by")
    parser.add_argument(
        "--golden", type=_count, default=0, metavar="N",
        help="states, of --calibration or random, whose decisions by the policy are kept in the engine, for `prove`; "
        "takes the memory that torch needs for the policy (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--pack", action="store_true",
        help="do not compile: write the packed graphs, which `prove` compiles on the device, where no policy is needed",
    )  # fmt: skip
    parser.add_argument("--legalize", action="store_true", help="raise formats that the target lacks, and record it")
    parser.add_argument(
        "--accept-conventions", action="store_true", help="go on where another convention fits clearly better"
    )


def _build(arguments: argparse.Namespace) -> int:
    from calibrator.quantizers import parse_choice
    from engine_build.build import Request, build
    from engine_build.inspect import summary

    request = Request(
        policy=arguments.policy,
        target=find_target(arguments.target),
        out=arguments.out,
        plan=arguments.plan,
        weights=arguments.weights,
        uniform=parse_choice(arguments.uniform) if arguments.uniform else None,
        legalize=arguments.legalize,
        backend=arguments.backend,
        calibration=arguments.calibration,
        unnorm_key=arguments.unnorm_key,
        accept_conventions=arguments.accept_conventions,
        golden=arguments.golden,
        pack=arguments.pack,
    )
    print(summary(build(request)))
    return 0


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_verify)
    parser.description = (
        "Compares the engine with its policy: bytes, formats, and numbers on some states. Nothing is written into the "
        "engine folder; the temporary files go to $TMPDIR and may be as large as the engine."
    )
    parser.add_argument("engine", type=Path, help="engine folder")
    parser.add_argument("--policy", type=Path, required=True, help="the policy that the engine was built from")
    parser.add_argument(
        "--calibration", type=Path, help="calibration set with reference states (default: random images)"
    )
    _add_unnorm_key(parser)
    parser.add_argument("--weights", type=Path, help="the stored weights that the engine was packed from, if it was")
    parser.add_argument("--samples", type=_positive, default=8, help="number of reference states (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random images (default: 0)")
    parser.add_argument("--formats-only", action="store_true", help="bytes and formats only: run nothing, need no GPU")
    parser.add_argument("--out", type=Path, help="write the outcome as JSON")


def _verify(arguments: argparse.Namespace) -> int:
    from engine_build.inspect import summary
    from engine_build.verify import States, verify
    from vla_policy.core.manifest import Manifest
    from vla_policy.core.outputs import check_file
    from vla_policy.core.verification import KIND

    if arguments.out is not None:
        check_file(arguments.out, KIND, [arguments.engine, arguments.policy, arguments.calibration, arguments.weights])
    states = States(arguments.calibration, arguments.samples, arguments.seed, arguments.unnorm_key)
    outcome = verify(arguments.engine, arguments.policy, None if arguments.formats_only else states, arguments.weights)
    print(summary(Manifest.load(arguments.engine)))
    print(outcome.summary)
    if arguments.out is not None:
        outcome.save(arguments.out)
    return 0


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_bench)
    parser.add_argument("engine", type=Path, help="engine folder")
    parser.add_argument(
        "--against", type=Path, nargs="+", required=True, metavar="ENGINE",
        help="16-bit engine folders of the same policy and target, of one backend or several; all take turns",
    )  # fmt: skip
    _add_unnorm_key(parser)
    parser.add_argument("--repeats", type=_positive, default=30, help="decisions per engine (default: 30)")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads per engine (default: 1)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument(
        "--cost-table", type=Path, help="also time every layer in every format and write the table (ms)"
    )
    parser.add_argument(
        "--plan", type=Path, help="the engine's plan: says how far the action is from the latency that it was made for"
    )
    parser.add_argument(
        "--formats",
        type=Format.parse,
        nargs="+",
        help="formats of the cost table (default: all that the engine's backend runs)",
    )


def _bench(arguments: argparse.Namespace) -> int:
    from engine_build.bench import baselines_missing, bench, report
    from engine_build.costs import KIND as COST_TABLE
    from engine_build.costs import cost_table, full_action_ms
    from engine_build.planned import beside_plan, planned_latency
    from vla_policy.core.bench import KIND as BENCH
    from vla_policy.core.files import write_json
    from vla_policy.core.manifest import Manifest
    from vla_policy.core.outputs import check_file

    for path, kind in ((arguments.out, BENCH), (arguments.cost_table, COST_TABLE)):
        if path is not None:
            check_file(path, kind, [arguments.engine, *arguments.against, arguments.plan])
    key = arguments.unnorm_key
    planned = planned_latency(arguments.plan, Manifest.load(arguments.engine).parents) if arguments.plan else None
    result = bench(arguments.engine, arguments.against, arguments.repeats, arguments.threads, unnorm_key=key)
    manifest = Manifest.load(arguments.engine)
    target = find_target(manifest.target).on(manifest.backend)
    print("\n".join([report(result), *baselines_missing(result, target)]))
    if planned is not None:
        print(beside_plan(result, planned))
    if arguments.out is not None:
        result.save(arguments.out)
    if arguments.cost_table is not None:
        action_ms = result.engine.stages["action"].median_ms
        full_ms = full_action_ms(result, target)
        formats = arguments.formats or target.legal()
        table = cost_table(manifest, formats, arguments.threads, action_ms, full_ms, unnorm_key=key)
        write_json(arguments.cost_table, table)
        print(f"{arguments.cost_table}: layers' times scaled by {table['scale']:.2f}, fixed {table['fixed_ms']:.2f} ms")
        if table["unfitted"]:
            print(f"note: not fitted to two whole actions, budgets may be missed by more: {table['unfitted']}")
    return 0


def _add_prove(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_prove)
    parser.description = (
        "Proves an engine on the device that shall run it; needs neither torch nor the policy. Compiles packed graphs, "
        "reads every layer's format back, decides the golden states, compares, times both engines, writes a report. "
        "Exit code 0: all proven; 1: something is not as it should be; 2: nothing could be begun."
    )
    parser.add_argument("engine", type=Path, help="engine folder, made with `build --golden`, packed or compiled")
    parser.add_argument("--against", type=Path, required=True, help="16-bit engine of the same policy and target")
    parser.add_argument("--target", choices=TARGETS, help="refuse engines of another target")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report and for what is compiled")
    parser.add_argument("--repeats", type=_positive, default=30, help="timed decisions per engine (default: 30)")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads per engine (default: 1)")


def _prove(arguments: argparse.Namespace) -> int:
    from engine_build.prove import prove

    passed = prove(
        arguments.engine, arguments.against, arguments.out, arguments.target, arguments.repeats, arguments.threads
    )
    print(f"{arguments.out / 'proof.md'}: {'proven' if passed else 'NOT proven'}")
    return 0 if passed else 1


def _add_unnorm_key(parser: argparse.ArgumentParser, what: str = "which of the policy's statistics to use") -> None:
    parser.add_argument("--unnorm-key", metavar="KEY", help=f"{what} (default: the only ones)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_inspect)
    parser.add_argument("engine", type=Path, help="engine folder")


def _inspect(arguments: argparse.Namespace) -> int:
    from engine_build.inspect import summary, table
    from vla_policy.core.manifest import Manifest

    manifest = Manifest.load(arguments.engine)
    manifest.check_files(arguments.engine)
    print(table(manifest))
    print(summary(manifest))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
