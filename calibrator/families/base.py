"""What a policy family provides, so that everything else need not know which families there are.

A family is a folder beside this file, named as the `model_type` of its policies' `config.json`; its package exports
`FAMILY`. The modules of `calibrator.modules` may be shared by several.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

import calibrator.families
from calibrator.modules.policy import Policy
from vla_policy.core.errors import PolicyError
from vla_policy.core.observation import Decision
from vla_policy.core.policy_config import PolicyConfig


class Decisions(Protocol):
    """One policy's decisions under one set of statistics: how firmly one is held, how far another is, its action.

    D values make a decision; `decided` is [B, D], `output` the policy's output.
    """

    @property
    def size(self) -> int:
        """D."""
        ...

    def objective(self, output: Tensor, decided: Tensor) -> Tensor:
        """J of Mix-QVLA Eq. (2), float32 [B]: how firmly `output` holds to what was decided."""
        ...

    def expected(self, output: Tensor) -> Tensor:
        """float32 [B, D]: the normalised action ([-1, 1] per dimension), differentiable."""
        ...

    def error(self, output: Tensor, decided: Tensor) -> Tensor:
        """QVLA Eq. (4) per state, float64 [B]: squared distance of the actions in normalised units."""
        ...

    def scores(self, output: Tensor) -> Tensor:
        """float32 [B, rows, values]: the part of `output` that decides, which engines are compared with."""
        ...

    def decision(self, decided: np.ndarray) -> Decision:
        """What [D] means for the robot."""
        ...


@dataclass(frozen=True)
class Family:
    """build: the policy's modules, with random weights. dead_tensors: names and shapes of the published tensors that
    inference never reads; a checkpoint may lack them. decisions: of a policy under the statistics of an `unnorm_key`;
    raises PolicyError for statistics that do not suffice.
    """

    build: Callable[[PolicyConfig], Policy]
    dead_tensors: Callable[[PolicyConfig], dict[str, tuple[int, ...]]]
    decisions: Callable[[PolicyConfig, str | None], Decisions]


def find_family(config: PolicyConfig) -> Family:
    """The family of a policy. Raises PolicyError naming the known ones."""
    model_type = config.raw["model_type"]
    known = [module.name for module in pkgutil.iter_modules(calibrator.families.__path__) if module.ispkg]
    if model_type not in known:
        raise PolicyError(f"model_type {model_type!r}: no family of this name; known: {', '.join(sorted(known))}")
    family: Family = importlib.import_module(f"calibrator.families.{model_type}").FAMILY
    return family
