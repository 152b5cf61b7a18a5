"""python -m calibrator: from recordings to a bit plan and its report."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from calibrator.commands import allocate, channels, check, collect, quantize, sensitivity, transform
from vla_policy.core.cli import run
from vla_policy.core.errors import VlaError

_COMMANDS = {
    "collect": (collect, "recordings -> calibration set"),
    "sensitivity": (sensitivity, "policy + calibration set -> scores"),
    "check": (check, "are states as the policy knows them?"),
    "allocate": (allocate, "scores + budget -> bit plan"),
    "channels": (channels, "QVLA: a width for every output channel"),
    "transform": (transform, "policy -> policy that is easier to round"),
    "quantize": (quantize, "policy + bit plan -> codes"),
}
# Commands whose options belong to their own modules, which also answer `--help`.
_ELSEWHERE = {
    "import-oft": ("calibrator.families.openvla_oft.published", "OpenVLA-OFT checkpoint -> policy folder"),
    "import-pi05": ("calibrator.families.pi05.published", "pi0.5 or pi0 checkpoint -> policy folder"),
    "report": ("calibrator.report", "scores + plan -> one HTML file"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m calibrator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        module.add(command)
        command.set_defaults(run=module.run)
    for name, (_, text) in _ELSEWHERE.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


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
        code: int = args.run(args)
        return code

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
