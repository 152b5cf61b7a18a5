"""What a policy family gives a robot: its configuration, its inputs, and the loop that decides with an engine.

Shapes: a decision is H actions of K values, H = 1 for most families.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from vla_policy.core.observation import Decision, Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.program import Program

Config = TypeVar("Config", bound=PolicyConfig)


class Policy(Protocol):
    """One policy under one set of statistics: everything around an engine's graphs."""

    @property
    def scored(self) -> str:
        """What `scores` are, in the plural, for messages."""
        ...

    def check_instruction(self, instruction: str) -> None:
        """Raises DataError for a task that the policy cannot take in every state: the prompt would be too long."""
        ...

    def inputs(self, observation: Observation) -> dict[str, np.ndarray]:
        """The program's inputs by name, each with a batch dimension of 1. Raises DataError for unusable data."""
        ...

    def decide(self, program: Program, inputs: Mapping[str, np.ndarray]) -> Decision:
        """The greedy decision. Raises EngineError for an output that is not finite."""
        ...

    def scores(self, program: Program, inputs: Mapping[str, np.ndarray], decided: Decision) -> np.ndarray:
        """float32 [positions, values]: what decisions are read from, along what was `decided`; raises as `decide`."""
        ...


class Family(Protocol[Config]):
    """A policy family; its folder exports it as `FAMILY`.

    files: of the policy folder, what `policy` reads; engines hold them too.
    """

    @property
    def files(self) -> tuple[str, ...]: ...

    def config(self, raw: dict[str, Any], source: str) -> Config:
        """The content of a config.json as types. Raises PolicyError naming `source` and what is wrong."""
        ...

    def check_folder(self, config: Config, folder: Path) -> None:
        """Raises PolicyError where another file of the policy folder says that something else is computed."""
        ...

    def policy(self, config: Config, folder: Path, unnorm_key: str | None) -> Policy:
        """The policy with its `files` in `folder`, for the statistics called `unnorm_key`."""
        ...

    def description(self, config: Config) -> dict[str, Any]:
        """Preprocessing and action layout in words and numbers, for a manifest that needs nothing else to be read."""
        ...
