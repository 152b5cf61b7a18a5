"""`python -m evaluation replay`: a bag through one or two engines, thresholds, and a report."""

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from evaluation.actors import ActorSpec
from evaluation.lerobot_set import LEROBOT
from evaluation.replay.compare import Comparison, compare
from evaluation.replay.export import Replay, write_lerobot, write_mcap
from evaluation.replay.live import ServingNode, serve
from evaluation.replay.page import WorstView, picture, render
from evaluation.replay.run import Answers, answer, recorded
from evaluation.replay.thresholds import Check, check, load_thresholds, write_junit
from vla_policy.core.bag import read_frames
from vla_policy.core.contract import Contract, load_contract
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file, sha256_folder, write_json
from vla_policy.core.instruction import normalised
from vla_policy.core.observe import observe
from vla_policy.core.outputs import FolderKind, atomic_folder, check_folder
from vla_policy.core.synchroniser import Frame

SCHEMA_VERSION = 1
_INPUTS = ("bag", "contract", "engine", "against", "served", "thresholds")
REPLAY = FolderKind(
    "replay", "replay.json", ("replay.html", "junit.xml", "served/metadata.yaml", "served/*.mcap", "served/*.db3")
)


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
    parser.add_argument("--instruction", type=normalised, default="", help="task, where the bag tells none")
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
    contract = load_contract(arguments.contract)
    names = tuple(dimension.name for dimension in contract.action.dimensions)
    thresholds = load_thresholds(arguments.thresholds, names) if arguments.thresholds else None
    for folder in (arguments.engine, arguments.against):
        if folder is not None:
            _spec(arguments, folder).config()
    with atomic_folder(arguments.out, REPLAY) as out:
        served = out / "served" if arguments.live else arguments.served
        candidate, reference = (_live if arguments.live else _in_process)(arguments, contract, served)
        comparison = None
        if reference is not None:
            comparison = compare(reference, candidate, contract.action, arguments.bins, arguments.worst)
        checks = check(thresholds, candidate, comparison) if thresholds else []
        sources = _sources(arguments, contract, served)
        _write(out, arguments, contract, sources, reference, candidate, comparison, checks, time.monotonic() - begun)
    _print(candidate, reference, comparison, checks, arguments.out)
    _export(arguments, Replay(arguments.bag, contract, candidate, reference, *_read_as(arguments)), sources)
    return 0 if all(item.passed for item in checks) else 1


def _read_as(arguments: argparse.Namespace) -> tuple[str, str]:
    return arguments.namespace, arguments.instruction


def _export(arguments: argparse.Namespace, replayed: Replay, sources: dict[str, str]) -> None:
    """Writes what other tools open, where it was asked for."""
    if arguments.lerobot:
        print(f"{arguments.lerobot}: {write_lerobot(replayed, arguments.lerobot, sources)} frames, LeRobot v3.0")
    if arguments.mcap:
        print(f"{arguments.mcap}: {write_mcap(replayed, arguments.mcap)} frames, for Foxglove")


def _spec(arguments: argparse.Namespace, folder: Path) -> ActorSpec:
    if not folder.is_dir():
        raise ArtefactError(f"{folder}: no such folder; expected an engine or a policy")
    kind: Literal["engine", "policy"] = "engine" if (folder / "manifest.json").is_file() else "policy"
    return ActorSpec(kind, folder, arguments.unnorm_key)


def _answer(arguments: argparse.Namespace, contract: Contract, folder: Path) -> Answers:
    actor = _spec(arguments, folder).load()
    return answer(arguments.bag, contract, actor, folder.name, arguments.namespace, arguments.instruction)


def _in_process(
    arguments: argparse.Namespace, contract: Contract, served: Path | None
) -> tuple[Answers, Answers | None]:
    """Candidate and reference."""
    candidate = _answer(arguments, contract, arguments.engine)
    if served is not None:
        return candidate, recorded(served, candidate)
    return candidate, None if arguments.against is None else _answer(arguments, contract, arguments.against)


def _live(arguments: argparse.Namespace, contract: Contract, served: Path) -> tuple[Answers, Answers | None]:
    """Candidate as a node served it, which becomes the bag `served`, and the reference in process."""
    if arguments.served is not None or _spec(arguments, arguments.engine).kind != "engine":
        raise ArtefactError("--live serves an engine folder anew; give one, and leave out --served")
    reference = _answer(arguments, contract, arguments.against or arguments.engine)
    node = ServingNode(arguments.engine, arguments.contract, arguments.unnorm_key)
    serve(node, arguments.bag, arguments.namespace, arguments.rate, served)
    return recorded(served, reference), reference


def _sources(arguments: argparse.Namespace, contract: Contract, served: Path | None) -> dict[str, str]:
    given = {"bag": arguments.bag, "engine": arguments.engine, "against": arguments.against, "served": served}
    hashes = {
        f"{name} {path.name}": sha256_folder(path) if path.is_dir() else sha256_file(path)
        for name, path in given.items()
        if path is not None
    }
    return hashes | {f"contract {arguments.contract.name}": contract.sha256}


def _write(
    out: Path,
    arguments: argparse.Namespace,
    contract: Contract,
    sources: dict[str, str],
    reference: Answers | None,
    candidate: Answers,
    comparison: Comparison | None,
    checks: list[Check],
    seconds: float,
) -> None:
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": "replay",
        "parents": sources,
        "unnorm_key": arguments.unnorm_key,
        "candidate": _summary(candidate),
        "reference": _summary(reference) if reference else None,
        "comparison": _without_nan(asdict(comparison)) if comparison else None,
        "checks": [asdict(item) for item in checks],
    }
    write_json(out / "replay.json", content)
    if arguments.thresholds:
        write_junit(out / "junit.xml", checks, seconds)
    views = _views(arguments, contract, reference, candidate, comparison)
    page = render(sources, reference, candidate, comparison, views, checks)
    (out / "replay.html").write_text(page, encoding="utf-8")


def _summary(answers: Answers) -> dict[str, Any]:
    return {
        "name": answers.name,
        "frames": len(answers.stamp_ns),
        "episodes": answers.episodes,
        "drops": answers.drops,
        "left_out": [asdict(item) for item in answers.left_out],
        "stray_frames": answers.strays,
        "decisions_sha256": answers.sha256,
        "latency_ms": answers.latency_ms.tolist(),
    }


def _without_nan(value: Any) -> Any:
    """NaN (an empty bin) as null: JSON has no other word for it."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _views(
    arguments: argparse.Namespace,
    contract: Contract,
    reference: Answers | None,
    candidate: Answers,
    comparison: Comparison | None,
) -> tuple[WorstView, ...]:
    """The worst frames with their pictures, read from the bag once more: holding every image would not scale."""
    if comparison is None or reference is None:
        return ()
    wanted = {item.stamp_ns for item in comparison.worst}
    pictures = {
        frame.stamp_ns: tuple(picture(image) for image in observe(frame, contract).images)
        for frame in read_frames(arguments.bag, contract, arguments.namespace, arguments.instruction)
        if isinstance(frame, Frame) and frame.stamp_ns in wanted
    }
    views = []
    for item in comparison.worst:
        row = int((candidate.stamp_ns == item.stamp_ns).nonzero()[0][0])
        values = zip(
            (dimension.name for dimension in contract.action.dimensions),
            reference.actions[item.index].tolist(),
            candidate.actions[row].tolist(),
            strict=False,  # of a chunk, its first row
        )
        views.append(WorstView(item, pictures[item.stamp_ns], candidate.instructions[row], tuple(values)))
    return tuple(views)


def _print(
    candidate: Answers, reference: Answers | None, comparison: Comparison | None, checks: list[Check], out: Path
) -> None:
    print(f"{candidate.name}: {len(candidate.stamp_ns)} frames answered, drops {candidate.drops or 'none'}")
    for left_out in candidate.left_out:
        print(f"left out: {left_out}")
    for answers in (candidate, reference):
        if answers is not None and answers.strays:
            print(f"{answers.name}: prefers a token that is no action in {answers.strays} frames")
    if comparison is not None and reference is not None:
        share = comparison.token_agreement
        tokens = "" if share is None else f", {100 * share:.2f} % of the tokens agree"
        same = f"{comparison.identical_frames} of {comparison.frames}"
        print(f"against {reference.name}: {same} frames identical{tokens}")
    for item in checks:
        print(f"{'pass' if item.passed else 'FAIL'}  {item.name}: {item.detail}")
    print(f"report: {out / 'replay.html'}")
