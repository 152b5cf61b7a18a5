"""What travels between a robot and a policy."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vla_policy.core.errors import EngineError, PolicyError
from vla_policy.core.policy_config import PolicyConfig

_FEW = 0.1


def finite(output: np.ndarray, what: str) -> np.ndarray:
    """`output` of a policy or engine. Raises EngineError unless every value is finite.

    Without this, argmax over NaN is the NaN's place: a token like any other, and mostly the largest action.
    """
    bad = output.size - int(np.isfinite(output).sum())
    if bad:
        raise EngineError(
            f"{what}: {bad} of {output.size} values are not finite; the weights are damaged or the arithmetic "
            "overflows: check the checkpoint and build the engine again"
        )
    return output


def check_strays(strays: int, states: int, source: str) -> None:
    """Raises PolicyError where a policy would rather answer no action in more than a few of so many states.

    A trained policy does so in none that is like those it was trained on, one whose tokens have another meaning in all.
    A tenth of the states is allowed, and a single one.
    """
    if strays > max(1, _FEW * states):
        raise PolicyError(
            f"{source}: in {strays} of {states} states the policy prefers a token that is no action; its tokens have "
            "another meaning (UniVLA's latent actions?), or the states are of another kind than it was trained on"
        )


@dataclass(frozen=True)
class Observation:
    """One control instant as the policy sees it.

    image: uint8 RGB, upright, [height, width, 3], of the first camera.
    instruction: the task in words.
    state: float32 [S] in SI units, in the order of the policy's proprio statistics; None where it takes no state.
    further: the images of the other cameras, in the contract's order; their sizes may differ.
    """

    image: np.ndarray
    instruction: str
    state: np.ndarray | None = None
    further: tuple[np.ndarray, ...] = ()

    @property
    def images(self) -> tuple[np.ndarray, ...]:
        """Every camera's image, the first camera's first."""
        return (self.image, *self.further)


@dataclass(frozen=True)
class Decision:
    """A policy's answer: action token ids int64 [K] and the action they stand for, float64 [K], un-normalised.

    A policy that decides a chunk of H control steps at once answers with H K tokens and actions [H, K]. There is no
    decision with an action that is not finite: making one raises EngineError.
    """

    tokens: np.ndarray
    action: np.ndarray

    def __post_init__(self) -> None:
        finite(self.action, "action")


class Actor(Protocol):
    """Whatever decides: a torch policy on a workstation, an engine on a robot."""

    @property
    def config(self) -> PolicyConfig:
        """The policy's configuration."""
        ...

    @property
    def unnorm_key(self) -> str:
        """The statistics that state and actions are normalised by."""
        ...

    def check_instruction(self, instruction: str) -> None:
        """Raises DataError for a task that the policy cannot take, whatever it sees with it."""
        ...

    def act(self, observation: Observation) -> Decision:
        """The greedy decision for one observation.

        Raises DataError for an observation that cannot be used and EngineError for an output that cannot.
        """
        ...
