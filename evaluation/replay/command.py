"""`python -m evaluation replay`: a bag through one or two engines, thresholds, and a report."""

import argparse
import time
from pathlib import Path

from evaluation.lerobot_set import LEROBOT
from evaluation.replay.artefact import REPLAY, write
from evaluation.replay.export import Replay, write_lerobot, write_mcap
from evaluation.replay.perform import Outcome, Request, perform
from evaluation.replay.run import Recording
from vla_policy.core.contract import load_contract
from vla_policy.core.errors import ArtefactError
from vla_policy.core.instruction import normalised
from vla_policy.core.outputs import atomic_folder, check_folder

_INPUTS = ("bag", "contract", "engine", "against", "served", "thresholds")


def add_replay(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.description = (
        "Answers every observation of a bag exactly once, in process or by the real node over DDS, and compares. Exit "
        "code 0: done and every threshold met; 1: a threshold failed; 2: bad input."
    )
    parser.add_argument("--bag", type=Path, required=True, help="rosbag2 folder, .mcap or .db3 file")
    parser.add_argument("--contract", type=Path, required=True, help="YAML that maps topics to the policy's inputs")
    parser.add_argument("--engine", type=Path, required=True, help="engine (or policy) folder under test")
    against = parser.add_mutually_exclusive_group()
    against.add_argument("--against", type=Path, help="engine (or policy) folder that is the reference")
    against.add_argument("--served", type=Path, help="bag of decisions that a node served: the reference")
    live = "--engine answers in a policy node over DDS; the reference, --against or else the same engine, in process"
    parser.add_argument("--live", action="store_true", help=live)
    rate = "with --live: times recorded speed, 0: as fast as it is answered (default %(default)s)"
    parser.add_argument("--rate", type=float, default=1.0, help=rate)
    parser.add_argument("--thresholds", type=Path, help="YAML that makes the replay a test")
    parser.add_argument("--out", type=Path, required=True, help="folder for replay.json, replay.html and junit.xml")
    parser.add_argument(
        "--unnorm-key", metavar="KEY", help="which of the policies' statistics to use (default: the only ones)"
    )
    parser.add_argument("--namespace", default="", help="ROS namespace of the contract's topics in the bag")
    parser.add_argument(
        "--instruction", type=normalised, default="", help="task before the first one that the bag tells"
    )
    parser.add_argument(
        "--bins", type=int, default=10, help="bins of progress through an episode (default %(default)s)"
    )
    parser.add_argument("--lerobot", type=Path, help="also write observations and actions as a LeRobot v3.0 data set")
    parser.add_argument("--mcap", type=Path, help="also write images and actions as an mcap bag that Foxglove plots")
    parser.add_argument("--worst", type=int, default=8, help="frames shown that differ most (default %(default)s)")
    parser.set_defaults(run=replay)


def replay(arguments: argparse.Namespace) -> int:
    """Runs the subcommand; returns 1 when a threshold failed."""
    begun = time.monotonic()
    given = [getattr(arguments, name) for name in _INPUTS]
    check_folder(arguments.out, REPLAY, given)
    if arguments.lerobot:
        check_folder(arguments.lerobot, LEROBOT, [*given, arguments.out])
    if arguments.mcap and arguments.mcap.exists():
        raise ArtefactError(f"{arguments.mcap}: exists already; choose another name or remove it")
    request = Request(
        recording=Recording(arguments.bag, arguments.namespace, arguments.instruction),
        contract=load_contract(arguments.contract),
        engine=arguments.engine,
        against=arguments.against,
        served=arguments.served,
        live=arguments.live,
        rate=arguments.rate,
        thresholds=arguments.thresholds,
        unnorm_key=arguments.unnorm_key,
        bins=arguments.bins,
        worst=arguments.worst,
    )
    request.check()
    with atomic_folder(arguments.out, REPLAY) as out:
        outcome = perform(request, served=out / "served")
        write(out, outcome, time.monotonic() - begun)
    _print(outcome)
    print(f"report: {arguments.out / 'replay.html'}")
    _export(outcome, arguments.lerobot, arguments.mcap)
    return 0 if outcome.passed else 1


def _export(outcome: Outcome, lerobot: Path | None, mcap: Path | None) -> None:
    """Writes what other tools open, where it was asked for."""
    request = outcome.request
    replayed = Replay(request.recording, request.contract, outcome.candidate, outcome.reference)
    if lerobot:
        print(f"{lerobot}: {write_lerobot(replayed, lerobot, outcome.sources)} frames, LeRobot v3.0")
    if mcap:
        print(f"{mcap}: {write_mcap(replayed, mcap)} frames, for Foxglove")


def _print(outcome: Outcome) -> None:
    candidate, reference, comparison = outcome.candidate, outcome.reference, outcome.comparison
    print(f"{candidate.name}: {len(candidate.stamp_ns)} frames answered, drops {candidate.drops or 'none'}")
    for left_out in candidate.left_out:
        print(f"left out: {left_out}")
    if comparison is not None and reference is not None:
        share = comparison.token_agreement
        tokens = "" if share is None else f", {100 * share:.2f} % of the tokens agree"
        same = f"{comparison.identical_frames} of {comparison.frames}"
        print(f"against {reference.name}: {same} frames identical{tokens}")
        for name, count in ((reference.name, comparison.only_reference), (candidate.name, comparison.only_candidate)):
            if count:
                print(f"not compared: {count} frames that only {name} answered")
        if comparison.neither:
            print(f"not compared: {comparison.neither} frames that neither answered")
    for item in outcome.checks:
        print(f"{'pass' if item.passed else 'FAIL'}  {item.name}: {item.detail}")
