"""The settings of a demo policy's training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from vla_policy.core.errors import DataError


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the training, so that a checkpoint of another recipe is refused."""

    seed: int = 0
    samples: int = 1_000_000
    batch: int = 512
    alternatives: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 200
    fall_fraction: float = 0.35
    ema_decay: float = 0.998
    target_sigma_bins: float = 2.0
    position_weight: float = 0.5
    search_weight: float = 0.3
    shift_pixels: int = 3
    state_noise: float = 0.01
    width: int = 192
    layers: int = 4
    image_size: int = 112
    patch_size: int = 16
    state_in_prompt: bool = True

    @property
    def steps(self) -> int:
        return self.samples // self.batch

    def but(self, changes: Sequence[str]) -> Self:
        """This recipe with `changes`, each NAME=VALUE. Raises DataError naming what cannot be changed so."""
        values: dict[str, Any] = {}
        for change in changes:
            name, _, text = change.partition("=")
            if name not in self.__dataclass_fields__:
                raise DataError(f"--set {change}: unknown; choose from: {', '.join(self.__dataclass_fields__)}")
            usual = getattr(self, name)
            try:
                value = json.loads(text)
            except ValueError:
                value = None
            if type(value) is not type(usual) and not (isinstance(usual, float) and type(value) is int):
                raise DataError(f"--set {change}: expected a value like {json.dumps(usual)}")
            values[name] = type(usual)(value)
        return replace(self, **values)


@dataclass(frozen=True)
class FlowRecipe(Recipe):
    """Of a flow-matching policy. horizon: rows of a chunk. executed: rows that are carried out before the next look.
    draws: noises and times for each answer, which share its pass through the prefix. expert_width, denoising_steps: of
    the expert.
    """

    horizon: int = 4
    executed: int = 1
    draws: int = 3
    expert_width: int = 192
    denoising_steps: int = 10
    batch: int = 64
    alternatives: int = 48
