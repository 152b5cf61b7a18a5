"""What an engine decides in this process on a bag's frames, and whether the node served exactly that."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.replay.run import Recording, answer
from vla_policy.core.contract import Contract
from vla_policy.core.errors import ArtefactError, VlaError
from vla_policy.core.files import read_json, sha256_file, write_json
from vla_policy.core.manifest import MANIFEST
from vla_policy.core.runner import load_engine


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
    answers = answer(Recording(bag), contract, load_engine(engine), title)
    rows = zip(answers.stamp_ns.tolist(), answers.instructions, answers.tokens, answers.actions, strict=True)
    return {
        stamp_ns: Decided(
            stamp_ns,
            instruction,
            tuple(int(token) for token in tokens),
            tuple(float(value).hex() for value in action),
        )
        for stamp_ns, instruction, tokens, action in rows
    }


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
    for row in record["decisions"]:
        _check(served, row, decided)
    return Parity(len(decided), len(record["decisions"]), len(record["decisions"]))


def _check(served: Path, row: dict[str, Any], decided: Mapping[int, Decided]) -> None:
    stamp_ns = row["stamp_ns"]
    if stamp_ns not in decided:
        raise ParityError(f"{served}: a decision for stamp {stamp_ns} ns, which is no frame of the bag")
    here = decided[stamp_ns]
    if (tuple(row["tokens"]), tuple(row["actions_hex"])) != (here.tokens, here.actions_hex):
        raise ParityError(
            f"{served}: frame {stamp_ns} ns: the node served tokens {row['tokens']}, the same engine in this "
            f"process gives {list(here.tokens)}; engine or inputs differ between the two paths"
        )
