"""A toy policy for a robot: one pass over an image's patches and the state decides two actions; no text is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_policy.core.image import resize
from vla_policy.core.observation import Decision, Observation, finite
from vla_policy.core.policy_config import PolicyConfig, parse_statistics
from vla_policy.core.program import Program


@dataclass(frozen=True, kw_only=True)
class ToyConfig(PolicyConfig):
    """width: values of every position. side: patches a side."""

    width: int
    side: int

    @property
    def patch_values(self) -> int:
        return 3 * (self.image_size // self.side) ** 2


class ToyPolicy:
    """Decides with the call `decide`."""

    scored = "normalised actions"

    def __init__(self, config: ToyConfig, unnorm_key: str | None) -> None:
        self._config = config
        self._stats = config.stats(unnorm_key)

    def check_instruction(self, instruction: str) -> None:
        """It reads none."""

    def inputs(self, observation: Observation) -> dict[str, np.ndarray]:
        """`patches` [1, P, values] in [0, 1] and `state` [1, S], normalised."""
        config, size = self._config, self._config.image_size // self._config.side
        image = resize(observation.image, config.image_size).astype(np.float32) / 255
        patches = image.reshape(config.side, size, config.side, size, 3).swapaxes(1, 2)
        assert self._stats.proprio is not None
        state = self._stats.proprio.normalised(observation.state)
        return {"patches": patches.reshape(1, config.side**2, -1), "state": state.astype(np.float32)[None]}

    def decide(self, program: Program, inputs: Mapping[str, np.ndarray]) -> Decision:
        return Decision(np.zeros(0, np.int64), to_actions(self._config, self._normalised(program, inputs)))

    def scores(self, program: Program, inputs: Mapping[str, np.ndarray], decided: Decision) -> np.ndarray:
        return self._normalised(program, inputs)

    def _normalised(self, program: Program, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        values, _ = program.run("decide", inputs)
        return finite(values["actions"][0], self.scored)


def to_actions(config: ToyConfig, normalised: np.ndarray) -> np.ndarray:
    """float64 [H, K] of the H K normalised values."""
    return np.asarray(normalised, np.float64).reshape(config.horizon, config.action_dim) / 2


class Toy:
    """The family."""

    files = ()

    def config(self, raw: dict[str, Any], source: str) -> ToyConfig:
        return ToyConfig(
            norm_stats=parse_statistics(raw["norm_stats"], "bounds", True, source),
            num_images=1,
            image_size=16,
            takes_state=True,
            horizon=2,
            steps_per_action=1,
            raw=raw,
            width=raw["width"],
            side=raw["side"],
        )

    def check_folder(self, config: ToyConfig, folder: Path) -> None:
        """Nothing beside config.json says anything."""

    def policy(self, config: ToyConfig, folder: Path, unnorm_key: str | None) -> ToyPolicy:
        return ToyPolicy(config, unnorm_key)

    def description(self, config: ToyConfig) -> dict[str, Any]:
        return {"preprocessing": {}, "actions": {key: {"chunk": config.horizon} for key in config.norm_stats}}


FAMILY = Toy()
