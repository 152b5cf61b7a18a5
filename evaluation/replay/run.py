"""A bag through an actor, in process: every frame exactly once, by the code that the robot runs."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vla_policy.core.bag import read_frames
from vla_policy.core.contract import Contract
from vla_policy.core.errors import ContractError
from vla_policy.core.left_out import LeftOut, Tally, told
from vla_policy.core.observation import Actor
from vla_policy.core.observe import check_contract
from vla_policy.core.served import ServedAction, read_served
from vla_policy.core.synchroniser import Dropped, Frame
from vla_policy.core.worker import Refusal, decide


@dataclass(frozen=True)
class Recording:
    """A bag that is replayed. namespace: of the contract's topics in it. instruction: the task of the frames before the
    first one that the bag holds."""

    bag: Path
    namespace: str = ""
    instruction: str = ""

    def frames(self, contract: Contract) -> Iterator[Frame | Dropped]:
        """Every frame once, and everything that could not be used."""
        return read_frames(self.bag, contract, self.namespace, self.instruction)


@dataclass(frozen=True)
class Answers:
    """What one actor answered. Arrays have one row per frame, in the bag's order.

    stamp_ns, episode, step: int64 [N]. tokens: int64 [N, H K]. actions: float64 [N, H K], un-normalised, the policy's
    units; H is 1 unless the policy decides chunks. latency_ms: float64 [N], the actor's own. left_out: messages and
    frames without an answer; refused: the images among them, reason by stamp.
    """

    name: str
    stamp_ns: np.ndarray
    episode: np.ndarray
    step: np.ndarray
    instructions: tuple[str, ...]
    tokens: np.ndarray
    actions: np.ndarray
    latency_ms: np.ndarray
    left_out: tuple[LeftOut, ...] = ()
    refused: dict[int, str] = field(default_factory=dict)

    @property
    def episodes(self) -> int:
        """How many of the bag's episodes have an answer."""
        return len(np.unique(self.episode))

    @property
    def drops(self) -> dict[str, int]:
        """How much was left out, by reason."""
        counts: Counter[str] = Counter()
        for item in self.left_out:
            counts[item.reason] += item.count
        return dict(sorted(counts.items()))

    @property
    def sha256(self) -> str:
        """Of stamps, tokens and actions: equal hashes mean identical replays. Latency is left out."""
        digest = hashlib.sha256()
        for array in (self.stamp_ns, self.tokens, self.actions):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def progress(self) -> np.ndarray:
        """float64 [N]: ρ = τ / (T - 1) within each episode, as in Mix-QVLA Eq. (11)."""
        last = np.zeros(int(self.episode.max()) + 1)
        np.maximum.at(last, self.episode, self.step)
        return self.step / np.maximum(last[self.episode], 1)


def answer(recording: Recording, contract: Contract, actor: Actor, name: str) -> Answers:
    """Runs the whole bag.

    Raises ContractError when bag, contract and actor do not fit, or nothing can be served.
    """
    check_contract(contract, actor.config, actor.unnorm_key)
    tally = Tally()
    refused: dict[int, str] = {}
    rows: list[tuple[Frame, np.ndarray, np.ndarray, float]] = []
    for frame in tqdm(_usable(recording, contract, tally, refused), desc=f"replay {name}", unit="frame"):
        outcome = decide(actor, contract, frame)
        if isinstance(outcome, Refusal):
            tally.add(contract.primary.topic, outcome.reason.value, str(outcome.error))
            refused[frame.stamp_ns] = outcome.reason.value
            continue
        decision, latency_ms = outcome
        rows.append((frame, decision.tokens, decision.action, latency_ms))
    if not rows:
        reasons = f"left out: {told(tally.found)}" if tally.found else "it is empty"
        raise ContractError(f"{recording.bag}: no frame could be served by {name}; {reasons}")
    frames = [row[0] for row in rows]
    return Answers(
        name=name,
        stamp_ns=np.asarray([frame.stamp_ns for frame in frames]),
        episode=np.asarray([frame.episode for frame in frames]),
        step=np.asarray([frame.step for frame in frames]),
        instructions=tuple(frame.instruction for frame in frames),
        tokens=np.stack([row[1].reshape(-1) for row in rows]),
        actions=np.stack([row[2].reshape(-1) for row in rows]),
        latency_ms=np.asarray([row[3] for row in rows]),
        left_out=tally.found,
        refused=refused,
    )


def recorded(served: Path, frames: Answers) -> Answers:
    """The decisions that a node served live, on the frames of an in-process run.

    What neither answered is dropped for the same reason; "unanswered" is what the node alone left out.
    Raises ContractError when the recording answers none of these frames, or one of them twice differently.
    """
    by_stamp: dict[int, ServedAction] = {}
    for action in read_served(served):
        if not np.isfinite(action.actions).all():  # no answer: nothing may move on it
            continue
        former = by_stamp.setdefault(action.stamp_ns, action)
        if not np.array_equal(former.actions, action.actions):
            raise ContractError(f"{served}: two different decisions for the image of {action.stamp_ns} ns")
    missing = {stamp: "unanswered" for stamp in frames.stamp_ns.tolist() if stamp not in by_stamp}
    kept = np.asarray([stamp in by_stamp for stamp in frames.stamp_ns.tolist()])
    if not kept.any():
        raise ContractError(f"{served}: answers no frame of this bag; was it recorded from another one?")
    chosen = [by_stamp[stamp] for stamp in frames.stamp_ns[kept].tolist()]
    answered = Counter(reason for stamp, reason in frames.refused.items() if stamp in by_stamp)
    left_out = [replace(item, count=item.count - answered[item.reason]) for item in frames.left_out]
    if not kept.all():
        example = f"the image of {frames.stamp_ns[~kept][0]} ns"
        left_out.append(LeftOut(served.name, "unanswered", int((~kept).sum()), example))
    return Answers(
        name=served.name,
        stamp_ns=frames.stamp_ns[kept],
        episode=frames.episode[kept],
        step=frames.step[kept],
        instructions=tuple(action.instruction for action in chosen),
        tokens=np.stack([action.tokens for action in chosen]),
        actions=np.stack([action.actions.reshape(-1) for action in chosen]),
        latency_ms=np.asarray([action.latency_ms for action in chosen]),
        left_out=tuple(item for item in left_out if item.count),
        refused=missing | {stamp: reason for stamp, reason in frames.refused.items() if stamp not in by_stamp},
    )


def _usable(recording: Recording, contract: Contract, tally: Tally, refused: dict[int, str]) -> Iterator[Frame]:
    for result in recording.frames(contract):
        if isinstance(result, Dropped):
            tally.add(result.topic, result.reason.value, result.detail)
            if result.topic == contract.primary.topic:
                refused[result.stamp_ns] = result.reason.value
        else:
            yield result
