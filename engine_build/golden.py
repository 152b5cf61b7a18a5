"""Golden states: what a policy decided of some states, kept in an engine's folder for machines that have no policy.

Of every state the torch policy's decision is kept, in full precision and in the engine's formats: action, tokens, and
the scores along the tokens. A device that has neither torch nor the checkpoint compares its engine with these.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from vla_policy.core.errors import ArtefactError
from vla_policy.core.observation import Decision, Observation
from vla_policy.core.runner import Engine
from vla_policy.core.verification import Decisions

GOLDEN = "golden.safetensors"
_VERSION = "2"


@dataclass(frozen=True)
class Expected:
    """A torch policy's decision of one state. scores: float32 [rows, values] along it. stray: it prefers no action."""

    decision: Decision
    scores: np.ndarray
    stray: bool


@dataclass(frozen=True)
class Golden:
    """States and what the policy decides of them, in the engine's formats and in full precision.

    source: where the states are from. unnorm_key: the statistics that they and the actions were normalised by.
    """

    source: str
    unnorm_key: str
    states: tuple[Observation, ...]
    same: tuple[Expected, ...]
    full: tuple[Expected, ...]

    def save(self, folder: Path) -> None:
        """Writes the file into an engine's folder."""
        tensors: dict[str, np.ndarray] = {}
        for index, state in enumerate(self.states):
            tensors |= {f"{index}.image.{place}": image for place, image in enumerate(state.images)}
            if state.state is not None:
                tensors[f"{index}.state"] = state.state
            for name, expected in (("same", self.same[index]), ("full", self.full[index])):
                decision = expected.decision
                tensors |= {
                    f"{index}.{name}.tokens": decision.tokens,
                    f"{index}.{name}.action": decision.action,
                    f"{index}.{name}.scores": expected.scores,
                    f"{index}.{name}.stray": np.array([expected.stray]),
                }
        about = {
            "version": _VERSION,
            "source": self.source,
            "unnorm_key": self.unnorm_key,
            "instructions": json.dumps([state.instruction for state in self.states]),
        }
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / GOLDEN, about)

    @staticmethod
    def load(folder: Path) -> "Golden":
        """Raises ArtefactError where the folder has none, or a damaged one."""
        path = folder / GOLDEN
        if not path.is_file():
            raise ArtefactError(f"{path}: no golden states; build the engine with `--golden 4 --calibration ...`")
        try:
            tensors = load_file(path)
            with safe_open(path, "np") as file:
                about = file.metadata()
            if about["version"] != _VERSION:
                raise ArtefactError(f"{path}: version {about['version']}, expected {_VERSION}; build the engine again")
            instructions = json.loads(about["instructions"])
            states = tuple(_state(tensors, index, words) for index, words in enumerate(instructions))
            same, full = (
                tuple(_expected(tensors, f"{index}.{name}") for index in range(len(states)))
                for name in ("same", "full")
            )
            return Golden(about["source"], about["unnorm_key"], states, same, full)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{path}: damaged ({error}); copy or build the engine again") from error


def _state(tensors: dict[str, np.ndarray], index: int, instruction: str) -> Observation:
    count = sum(name.startswith(f"{index}.image.") for name in tensors)
    first, *further = (tensors[f"{index}.image.{place}"] for place in range(count))
    return Observation(first, instruction, tensors.get(f"{index}.state"), tuple(further))


def _expected(tensors: dict[str, np.ndarray], name: str) -> Expected:
    decision = Decision(tensors[f"{name}.tokens"], tensors[f"{name}.action"])
    return Expected(decision, tensors[f"{name}.scores"], bool(tensors[f"{name}.stray"][0]))


def compare(
    engine: Engine, expected: Sequence[Expected], states: Sequence[Observation], title: str
) -> Decisions:
    """Along the torch policy's decision for the scores, each deciding freely for tokens and actions."""
    errors, largest, cosines, equal, actions = [], [], [], [], []
    pairs = tqdm(zip(expected, states, strict=True), total=len(states), desc=title, unit="state", disable=None)
    for wanted, state in pairs:
        got, reference = engine.act(state), wanted.scores
        difference = engine.scores(state, wanted.decision) - reference
        errors.append(float(np.sqrt((difference**2).mean()) / reference.std()))
        largest.append(float(np.abs(difference).max()))
        cosines.append(_smallest_cosine(reference, reference + difference))
        equal += [got.tokens == wanted.decision.tokens] if wanted.decision.tokens.size else []
        actions.append(float(np.abs(got.action - wanted.decision.action).max()))
    return Decisions(
        scores_error=max(errors),
        scores_max_abs=max(largest),
        cosine=min(cosines),
        equal_tokens=float(np.mean(equal)) if equal else None,
        equal_decisions=float(np.mean([row.all() for row in equal])) if equal else None,
        action_max_abs=max(actions),
        stray_states=sum(wanted.stray for wanted in expected),
    )


def _smallest_cosine(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left - left.mean(1, keepdims=True), right - right.mean(1, keepdims=True)
    return float(((left * right).sum(1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))).min())
