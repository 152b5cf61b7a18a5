"""`check`: whether recorded states are as the policy knows them; `collect` asks the same of what it collects."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from calibrator.commands import options

if TYPE_CHECKING:
    from calibrator.conventions.deciders import Decider
    from calibrator.data.calibration import CalibrationSet


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compares the policy's own decisions on recorded states with the recorded actions, as they are and with images "
        "turned, mirrored or in other colours, other statistics, another order or sign. Exit code 2 where another "
        "convention fits clearly better. sensitivity does so too, and its report shows the table as a picture."
    )
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--policy", type=Path, help="policy folder")
    who.add_argument("--engine", type=Path, help="engine folder instead, e.g. on the robot with a bag of its own")
    parser.add_argument("--calibration", type=Path, required=True, help="calibration set with recorded actions")
    options.add_unnorm_key(parser)
    options.add_device(parser)
    options.add_accept(parser)


def run(args: argparse.Namespace) -> int:
    from calibrator.data.calibration import load_calibration

    print(conventions(args, load_calibration(args.calibration)))
    return 0


def conventions(args: argparse.Namespace, states: "CalibrationSet") -> str:
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
