"""Whether the served actions are those of the same engine called in this process on the same frames, bit for bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vla_policy.core.bag import read_frames
from vla_policy.core.contract import Contract
from vla_policy.core.errors import ArtefactError, VlaError
from vla_policy.core.files import read_json, sha256_file
from vla_policy.core.observe import observe
from vla_policy.core.runner import load_engine
from vla_policy.core.synchroniser import Frame


class ParityError(VlaError):
    """A served action that differs from the in-process one."""


@dataclass(frozen=True)
class Parity:
    """Frames of the bag, frames that were served, and served frames whose tokens and action are equal bit for bit."""

    frames: int
    served: int
    equal: int


def check_parity(served: Path, engine: Path, bag: Path, contract: Contract) -> Parity:
    """Decides every frame again in this process.

    Raises ParityError for the first decision that differs or that belongs to no frame, ArtefactError where `served`
    was recorded with another engine.
    """
    record = read_json(served, kind="served")
    engine_id = sha256_file(engine / "manifest.json")
    if record["parents"]["engine"] != engine_id:
        raise ArtefactError(
            f"{served}: recorded with engine {record['parents']['engine'][:12]}, {engine} is {engine_id[:12]}; "
            "serve again"
        )
    answers: dict[int, dict[str, Any]] = {decision["stamp_ns"]: decision for decision in record["decisions"]}
    frames = [frame for frame in read_frames(bag, contract) if isinstance(frame, Frame)]
    unknown = sorted(answers.keys() - {frame.stamp_ns for frame in frames})
    if unknown:
        raise ParityError(f"{served}: a decision for stamp {unknown[0]} ns, which is no frame of {bag}")
    actor = load_engine(engine)
    equal = 0
    for frame in tqdm(frames, unit="frame", desc="in-process"):
        if (answer := answers.get(frame.stamp_ns)) is None:
            continue
        decision = actor.act(observe(frame, contract))
        here = ([int(token) for token in decision.tokens], [float(value).hex() for value in decision.action])
        there = (answer["tokens"], answer["actions_hex"])
        if here != there:
            raise ParityError(
                f"{served}: frame {frame.stamp_ns} ns: the node served tokens {there[0]}, the same engine in this "
                f"process gives {here[0]}; engine or inputs differ between the two paths"
            )
        equal += 1
    return Parity(len(frames), len(answers), equal)
