"""What a policy family provides, so that everything else need not know which families there are.

A family is a folder beside this file, named as the `model_type` of its policies' `config.json`; its package exports
`FAMILY`. The modules of `calibrator.modules` may be shared by several.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from calibrator.modules.policy import Policy
from vla_policy.core import registry
from vla_policy.core.errors import PolicyError
from vla_policy.core.observation import Decision
from vla_policy.core.policy_config import PolicyConfig

_FAMILIES = "calibrator.families"


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

    def strays(self, output: Tensor) -> Tensor:
        """bool [B]: whether the policy would rather answer something that is no action of this family."""
        ...

    def decision(self, decided: np.ndarray) -> Decision:
        """What [D] means for the robot."""
        ...


@dataclass(frozen=True)
class Family:
    """What is known of a family by the configuration of its own type, a PolicyConfig.

    build: the policy's modules, with random weights. dead_tensors: names and shapes of the published tensors that
    inference never reads; a checkpoint may lack them. decisions: of a policy under the statistics of an `unnorm_key`;
    raises PolicyError for statistics that do not suffice.
    """

    build: Callable[[Any], Policy]
    dead_tensors: Callable[[Any], dict[str, tuple[int, ...]]]
    decisions: Callable[[Any, str | None], Decisions]


def find_family(config: PolicyConfig) -> Family:
    """The family of a policy. Raises PolicyError naming the known ones."""
    model_type = config.raw["model_type"]
    family: Family | None = registry.find(_FAMILIES, model_type, "FAMILY")
    if family is None:
        known = ", ".join(registry.names(_FAMILIES))
        raise PolicyError(f"model_type {model_type!r}: no family of this name; known: {known}")
    return family
