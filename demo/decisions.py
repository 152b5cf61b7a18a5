"""What an engine decides in this process on a bag's frames, and whether the node served exactly that."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vla_policy.core.bag import read_frames
from vla_policy.core.contract import Contract
from vla_policy.core.errors import ArtefactError, VlaError
from vla_policy.core.files import read_json, sha256_file, write_json
from vla_policy.core.manifest import MANIFEST
from vla_policy.core.observe import observe
from vla_policy.core.runner import load_engine
from vla_policy.core.synchroniser import Frame


class ParityError(VlaError):
    """A served action that differs from the in-process one."""


@dataclass(frozen=True)
class Decided:
    """One frame's decision. actions_hex: the float64 values as `float.hex`, so that equal text means equal bits."""

    stamp_ns: int
    instruction: str
    tokens: tuple[int, ...]
    actions_hex: tuple[str, ...]


@dataclass(frozen=True)
class Parity:
    """Frames of the bag, frames that were served, and served frames whose tokens and action are equal bit for bit."""

    frames: int
    served: int
    equal: int


def decide(engine: Path, bag: Path, contract: Contract, title: str) -> dict[int, Decided]:
    """The engine's decision on every frame of the bag, by stamp."""
    frames = [frame for frame in read_frames(bag, contract) if isinstance(frame, Frame)]
    actor = load_engine(engine)
    decided = {}
    for frame in tqdm(frames, unit="frame", desc=title):
        decision = actor.act(observe(frame, contract))
        decided[frame.stamp_ns] = Decided(
            frame.stamp_ns,
            frame.instruction,
            tuple(int(token) for token in decision.tokens),
            tuple(float(value).hex() for value in decision.action),
        )
    return decided


def write_decisions(path: Path, engine: Path, contract: Contract, decided: Mapping[int, Decided]) -> None:
    """Writes the artefact of kind `decisions`."""
    parents = {"engine": sha256_file(engine / MANIFEST), "contract": contract.sha256}
    content = {"parents": parents, "decisions": [asdict(decision) for decision in decided.values()]}
    write_json(path, {"schema_version": 1, "kind": "decisions", **content})


def check_parity(served: Path, engine: Path, bag: Path, contract: Contract) -> Parity:
    """Decides every frame again in this process.

    Raises ParityError for the first decision that differs or that belongs to no frame, ArtefactError where `served`
    was recorded with another engine.
    """
    record = read_json(served, kind="served")
    engine_id = sha256_file(engine / MANIFEST)
    if record["parents"]["engine"] != engine_id:
        raise ArtefactError(
            f"{served}: recorded with engine {record['parents']['engine'][:12]}, {engine} is {engine_id[:12]}; "
            "serve again"
        )
    decided = decide(engine, bag, contract, "in-process")
    for answer in record["decisions"]:
        _check(served, answer, decided)
    return Parity(len(decided), len(record["decisions"]), len(record["decisions"]))


def _check(served: Path, answer: dict[str, Any], decided: Mapping[int, Decided]) -> None:
    stamp_ns = answer["stamp_ns"]
    if stamp_ns not in decided:
        raise ParityError(f"{served}: a decision for stamp {stamp_ns} ns, which is no frame of the bag")
    here = decided[stamp_ns]
    if (tuple(answer["tokens"]), tuple(answer["actions_hex"])) != (here.tokens, here.actions_hex):
        raise ParityError(
            f"{served}: frame {stamp_ns} ns: the node served tokens {answer['tokens']}, the same engine in this "
            f"process gives {list(here.tokens)}; engine or inputs differ between the two paths"
        )
