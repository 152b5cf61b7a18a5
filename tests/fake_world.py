"""A benchmark of numbers and an actor that plays it: what the rollout machinery does around real ones, in milliseconds.

An episode shows its secret as the image's brightness; the policy must answer with it. The module is importable in
worker processes.
"""

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from fake_config import FakeConfig

from evaluation.actors import Size
from evaluation.benchmarks.base import StepResult
from vla_policy.core.errors import DataError
from vla_policy.core.observation import Decision, Observation
from vla_policy.core.policy_config import PolicyConfig

_TOWER = {"image_size": 32, "patch_size": 16, "width": 8, "depth": 2, "heads": 1, "mlp_width": 8, "registers": 0}
_CONFIG = {
    "model_type": "openvla",
    "pad_to_multiple_of": 64,
    "n_action_bins": 256,
    "vision_towers": [{"kind": kind, **_TOWER} for kind in ("dinov2", "siglip")],
    "norm_stats": {"fake": {"action": {"q01": [-1.0], "q99": [1.0]}}},
}
TASKS = {"read": "say the number", "double": "say twice the number", "negate": "say minus the number"}
_ANSWERS: dict[str, Callable[[int], int]] = {
    "say the number": lambda number: number,
    "say twice the number": lambda number: 2 * number,
    "say minus the number": lambda number: -number,
}


class FakeEnv:
    """Success is the right answer within three decisions; trial 3 of "negate" has no right answer."""

    name = "fake"
    tasks = tuple(TASKS)
    steps_per_action = 1
    max_decisions = 3

    def __init__(self, benchmark: str, config: PolicyConfig) -> None:
        self._secret = 0
        self._task = ""
        self._trial = 0
        self._decisions = 0

    def instruction(self, task: str) -> str:
        if task not in TASKS:
            raise DataError(f"fake task {task!r} is unknown")
        return TASKS[task]

    def reset(self, task: str, trial: int, seed: int) -> Observation:
        self._task, self._trial, self._decisions = task, trial, 0
        self._secret = int(np.random.default_rng([seed, trial]).integers(1, 100))
        return self._observation()

    def initial_state(self) -> str:
        return hashlib.sha256(f"{self._task} {self._secret}".encode()).hexdigest()

    def step(self, action: np.ndarray) -> StepResult:
        self._decisions += 1
        answer = _ANSWERS[TASKS[self._task]](self._secret)
        success = int(action[0]) == answer and (self._task, self._trial) != ("negate", 3)
        return StepResult(self._observation(), success, success or self._decisions >= self.max_decisions)

    def aux(self) -> np.ndarray:
        return np.zeros(6, np.float32)

    def close(self) -> None:
        self._task = ""

    def _observation(self) -> Observation:
        return Observation(np.full((32, 32, 3), self._secret, np.uint8), TASKS[self._task], np.zeros(2, np.float32))


class FakeActor:
    """Reads the number off the image and answers as the instruction says."""

    def __init__(self, recipe: "FakeRecipe") -> None:
        self._recipe = recipe
        self._acts = 0

    unnorm_key = "fake"

    @property
    def config(self) -> PolicyConfig:
        return self._recipe.config()

    def act(self, observation: Observation) -> Decision:
        self._acts += 1
        self._recipe.maybe_kill(self._acts)
        number = int(observation.image[0, 0, 0])
        answer = np.array([float(_ANSWERS[observation.instruction](number))])
        if number >= self._recipe.too_large:
            answer[0] = np.inf
        if self._recipe.chunk > 1:  # the right answer comes last
            answer = np.stack([*np.zeros((self._recipe.chunk - 1, 1)), answer])
        return Decision(np.zeros(1, np.int64), answer)


@dataclass(frozen=True)
class FakeRecipe:
    """chunk: actions per decision. executed: of these carried out before the next look, None for all.

    victim: who is hit at the `fatal_act`-th decision, once (`fired` records it): "self" and "parent" get SIGKILL;
    "interrupt" is a Ctrl-C for the parent. too_large: numbers from here on overflow.
    """

    name: str = "fake"
    victim: str | None = None
    fatal_act: int = 0
    fired: Path | None = None
    chunk: int = 1
    executed: int | None = None
    too_large: int = 100

    def settings(self) -> dict[str, Any]:
        return {"kind": "fake", "name": self.name}

    def config(self) -> PolicyConfig:
        plain = PolicyConfig.from_dict(_CONFIG, "fake")
        told = {field.name: getattr(plain, field.name) for field in fields(PolicyConfig)} | {"horizon": self.chunk}
        return FakeConfig(**told, carried_out=self.executed or self.chunk)

    def size(self) -> Size:
        return Size(2_500_000, 10_000_000, 1_500_000)

    def load(self) -> FakeActor:
        return FakeActor(self)

    def maybe_kill(self, acts: int) -> None:
        if self.victim is None or self.fired is None or acts != self.fatal_act or self.fired.exists():
            return
        self.fired.touch()
        if self.victim == "self":
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getppid(), signal.SIGINT if self.victim == "interrupt" else signal.SIGKILL)
        while True:
            signal.pause()  # only the lifeline can end this process now
