"""Command line: build, verify, inspect, bench."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

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
    _add_inspect(commands.add_parser("inspect", help="print what an engine holds"))
    return parser


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_build)
    parser.add_argument("--policy", type=Path, required=True, help="folder in the published OpenVLA layout")
    plan = parser.add_mutually_exclusive_group(required=True)
    plan.add_argument("--plan", type=Path, help="plan.json made by `calibrator allocate` for this policy")
    plan.add_argument("--uniform", type=Format.parse, metavar="FORMAT", help="every layer in one format, e.g. w16a16")
    parser.add_argument("--target", choices=TARGETS, default="cpu", help="machine that runs the engine (default: cpu)")
    parser.add_argument("--out", type=Path, required=True, help="engine folder to write; replaced when complete")
    parser.add_argument("--legalize", action="store_true", help="raise formats that the target lacks, and record it")


def _build(arguments: argparse.Namespace) -> int:
    from engine_build.build import Request, build
    from engine_build.inspect import summary

    request = Request(
        policy=arguments.policy,
        target=find_target(arguments.target),
        out=arguments.out,
        plan=arguments.plan,
        uniform=arguments.uniform,
        legalize=arguments.legalize,
    )
    print(summary(build(request)))
    return 0


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
