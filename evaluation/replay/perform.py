"""One replay: who answers which recording, by what thresholds, and what came of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evaluation.actors import ActorSpec
from evaluation.replay.compare import Comparison, compare
from evaluation.replay.live import ServingNode, serve
from evaluation.replay.run import Answers, Recording, answer, recorded
from evaluation.replay.thresholds import NO_REFERENCE, Check, Thresholds, check, load_thresholds
from vla_policy.core.contract import Contract
from vla_policy.core.errors import ArtefactError, ContractError
from vla_policy.core.files import sha256_file, sha256_folder


@dataclass(frozen=True)
class Request:
    """engine: the folder under test. against: the folder that is the reference, or served: a bag of decisions that is.

    live: the engine answers in a policy node over DDS at `rate` times the recorded speed. bins: of progress. worst: how
    many frames are shown.
    """

    recording: Recording
    contract: Contract
    engine: Path
    against: Path | None = None
    served: Path | None = None
    live: bool = False
    rate: float = 1.0
    thresholds: Path | None = None
    unnorm_key: str | None = None
    bins: int = 10
    worst: int = 8

    def actor(self, folder: Path) -> ActorSpec:
        """Raises ArtefactError for what is no folder."""
        if not folder.is_dir():
            raise ArtefactError(f"{folder}: no such folder; expected an engine or a policy")
        kind: Literal["engine", "policy"] = "engine" if (folder / "manifest.json").is_file() else "policy"
        return ActorSpec(kind, folder, self.unnorm_key)

    def check(self) -> Thresholds | None:
        """The thresholds. Raises what can be known to be wrong before anything is answered."""
        for name, value, least in (("bins", self.bins, 1), ("worst", self.worst, 0), ("rate", self.rate, 0)):
            if not value >= least:
                raise ContractError(f"--{name}: expected {least} or more, got {value}")
        thresholds = load_thresholds(self.thresholds, self.contract.action) if self.thresholds else None
        if self.live and (self.served is not None or self.actor(self.engine).kind != "engine"):
            raise ArtefactError("--live serves an engine folder anew; give one, and leave out --served")
        if thresholds and thresholds.needs_reference and not (self.against or self.served or self.live):
            raise ContractError(NO_REFERENCE)
        for folder in (self.engine, self.against):
            if folder is not None:
                self.actor(folder).config()
        return thresholds


@dataclass(frozen=True)
class Outcome:
    """What a replay gave. sources: what was read, and its sha256."""

    request: Request
    candidate: Answers
    reference: Answers | None
    comparison: Comparison | None
    checks: list[Check]
    sources: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(item.passed for item in self.checks)


def perform(request: Request, served: Path) -> Outcome:
    """Answers and compares. served: the bag to be written of what a live node decides."""
    thresholds = request.check()
    if request.live:
        candidate, reference = _live(request, served)
    else:
        candidate, reference = _in_process(request)
    comparison = None
    if reference is not None:
        comparison = compare(reference, candidate, request.contract.action, request.bins, request.worst)
    checks = check(thresholds, candidate, reference, comparison) if thresholds else []
    sources = _sources(request, served if request.live else request.served)
    return Outcome(request, candidate, reference, comparison, checks, sources)


def _answer(request: Request, folder: Path) -> Answers:
    return answer(request.recording, request.contract, request.actor(folder).load(), folder.name)


def _in_process(request: Request) -> tuple[Answers, Answers | None]:
    """Candidate and reference."""
    candidate = _answer(request, request.engine)
    if request.served is not None:
        return candidate, recorded(request.served, candidate)
    return candidate, None if request.against is None else _answer(request, request.against)


def _live(request: Request, served: Path) -> tuple[Answers, Answers | None]:
    """Candidate as a node served it, which becomes the bag `served`, and the reference in process."""
    reference = _answer(request, request.against or request.engine)
    node = ServingNode(request.engine, Path(request.contract.path), request.unnorm_key)
    serve(node, request.recording, request.rate, served)
    return recorded(served, reference), reference


def _sources(request: Request, served: Path | None) -> dict[str, str]:
    bag, contract = request.recording.bag, request.contract
    given = {"bag": bag, "engine": request.engine, "against": request.against, "served": served}
    hashes = {
        f"{name} {path.name}": sha256_folder(path) if path.is_dir() else sha256_file(path)
        for name, path in given.items()
        if path is not None
    }
    return hashes | {f"contract {Path(contract.path).name}": contract.sha256}
