"""What every closed-loop benchmark offers: named tasks, numbered trials, held actions, success."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vla_policy.core.observation import Observation


@dataclass(frozen=True)
class StepResult:
    """What one held action led to.

    success: the task is done. done: the episode is over, by success or because max_decisions are spent.
    """

    observation: Observation
    success: bool
    done: bool


class BenchmarkEnv(Protocol):
    """One benchmark in one process with one renderer, so that images stay trustworthy.

    Observations carry upright uint8 RGB images and, unless the policy wants another, float32 [5] states: end-effector
    x, y, z (m), gripper width (m) and gripper velocity (m/s).
    """

    @property
    def name(self) -> str:
        """The benchmark's name on command lines and in results."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the benchmark's order."""
        ...

    @property
    def steps_per_action(self) -> int:
        """Simulator steps for which one action is held."""
        ...

    @property
    def max_decisions(self) -> int:
        """Actions after which an episode counts as failed."""
        ...

    def instruction(self, task: str) -> str:
        """The task in words. Raises DataError for an unknown task."""
        ...

    def reset(self, task: str, trial: int, seed: int) -> Observation:
        """Starts an episode in the initial state that (task, trial, seed) names.

        Raises DataError for an unknown task or a trial that the benchmark does not have.
        """
        ...

    def initial_state(self) -> str:
        """sha256 of the simulator state after the last reset: equal hashes prove that runs are paired."""
        ...

    def step(self, action: np.ndarray) -> StepResult:
        """Holds `action` [K] for `steps_per_action` simulator steps, or fewer where the task is done before.

        Raises DataError for a wrong shape or a value that is not finite.
        """
        ...

    def aux(self) -> np.ndarray:
        """float32 [6]: position of the task's object and of its goal in metres, world frame. For training only."""
        ...

    def close(self) -> None:
        """Frees simulator and renderer."""
        ...


def project(model: Any, data: Any, camera: int, points: np.ndarray) -> np.ndarray:
    """float64 [N, 2]: where `points` [N, 3] (metres, world) appear in a square image of a MuJoCo camera.

    (0, 0) is the upper left corner and (1, 1) the lower right one.
    """
    # The columns of a camera's frame point right, up and backward.
    right, up, backward = ((points - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)).T
    focal = 0.5 / np.tan(np.radians(model.cam_fovy[camera]) / 2)
    return np.stack([0.5 - focal * right / backward, 0.5 + focal * up / backward], axis=1)
