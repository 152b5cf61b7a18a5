"""`python -m evaluation`: closed-loop rollouts, paired comparisons, and the tables made of them."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from evaluation.actors import ActorSpec
from evaluation.benchmarks.registry import BENCHMARKS
from evaluation.compare import compare, describe
from evaluation.draft import add_contract
from evaluation.replay.command import add_replay
from evaluation.results import KIND as ROLLOUT
from evaluation.results import RolloutResult, describe_result
from evaluation.rollout import Rollout, run
from vla_policy.core import cli
from vla_policy.core.formats import Choice
from vla_policy.core.outputs import check_file


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv` and runs one subcommand; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return cli.run(partial(arguments.run, arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_rollout(commands.add_parser("rollout", help="score a policy or an engine in closed loop, or compare two runs"))
    _add_table(commands.add_parser("table", help="run every rollout of a configuration and write one Markdown table"))
    add_contract(commands.add_parser("contract", help="draft a contract from what a bag holds, for you to finish"))
    add_replay(commands.add_parser("replay", help="answer a bag's frames with one engine or two, compare, and test"))
    return parser


def _add_rollout(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--policy", type=Path, help="policy folder (torch, on the CPU)")
    what.add_argument("--engine", type=Path, help="engine folder made by `python -m engine_build build`")
    what.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="two results on the same initial states: exact McNemar test and the difference with its interval",
    )
    parser.add_argument("--benchmark", choices=BENCHMARKS, help="simulated benchmark")
    parser.add_argument("--tasks", nargs="+", default=[], help="task names (default: all of the benchmark)")
    parser.add_argument("--trials", type=int, default=50, help="initial states per task (default %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="names the set of initial states (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes, one renderer each (default %(default)s)")
    parser.add_argument("--out", type=Path, help="result JSON; its journal beside it makes the run resumable")
    parser.add_argument("--unnorm-key", help="which of the policy's statistics to use (default: the only ones)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="torch policies only")
    rounded = parser.add_mutually_exclusive_group()
    rounded.add_argument(
        "--uniform",
        metavar="CHOICE",
        help="every live layer rounded, e.g. w4a16_g64:rtn (torch policies; default: leave them alone)",
    )
    rounded.add_argument("--plan", type=Path, help="layers rounded as plan.json says (torch policies)")
    rounded.add_argument("--weights", type=Path, help="codes from `calibrator quantize` (torch policies)")
    control = parser.add_mutually_exclusive_group()
    control.add_argument("--blind", action="store_true", help="control: the policy sees a grey image")
    control.add_argument("--wrong-instruction", action="store_true", help="control: the policy hears another task")
    parser.add_argument("--no-video", action="store_true", help="do not keep a film of each failure")
    parser.set_defaults(run=partial(_rollout, parser))


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="YAML list of runs, e.g. demo/evaluation.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder for results, journals and table.md")
    parser.add_argument("--workers", type=int, default=1, help="processes, one renderer each (default %(default)s)")
    parser.set_defaults(run=_table)


def _rollout(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.compare:
        first, second = (RolloutResult.read(path) for path in arguments.compare)
        print(describe(compare(first, second)))
        return 0
    if arguments.benchmark is None or arguments.out is None:
        parser.error("--benchmark and --out are needed to run episodes")
    rounded = arguments.uniform or arguments.plan or arguments.weights
    if arguments.engine and (rounded or arguments.dtype != "float32"):
        parser.error("--uniform, --plan, --weights and --dtype belong to --policy; an engine has its formats built in")
    check_file(arguments.out, ROLLOUT, [arguments.engine or arguments.policy, arguments.plan, arguments.weights])
    actor = ActorSpec(
        kind="engine" if arguments.engine else "policy",
        folder=arguments.engine or arguments.policy,
        unnorm_key=arguments.unnorm_key,
        uniform=_choice(arguments.uniform),
        plan=arguments.plan,
        weights=arguments.weights,
        dtype=arguments.dtype,
    )
    rollout = Rollout(
        benchmark=arguments.benchmark,
        actor=actor,
        seed=arguments.seed,
        control="blind" if arguments.blind else "wrong_instruction" if arguments.wrong_instruction else "none",
        videos=None if arguments.no_video else arguments.out.with_suffix(".failures"),
    )
    result = run(rollout, tuple(arguments.tasks), arguments.trials, arguments.out, arguments.workers)
    print(describe_result(result))
    return 0


def _choice(text: str | None) -> Choice | None:
    from calibrator.quantizers import parse_choice

    return None if text is None else parse_choice(text)


def _table(arguments: argparse.Namespace) -> int:
    from evaluation.tables import run_table

    path = run_table(arguments.config, arguments.out, arguments.workers)
    print(path.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
