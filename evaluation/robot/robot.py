"""LIBERO behind a robot's interface: velocities and a finger opening in, one control step at a time. No ROS here."""

from dataclasses import dataclass

import numpy as np

from evaluation.benchmarks.libero import CONTROL_HZ, DEMO_PROTOCOL, LiberoEnv
from evaluation.experts.libero import LiberoObjectExpert
from vla_policy.core.contract import ActionContract
from vla_policy.core.errors import DataError
from vla_policy.core.observation import Observation

CONTROL_PERIOD_NS = round(1e9 / CONTROL_HZ)
SETTLE_STEPS = DEMO_PROTOCOL.wait_steps


@dataclass(frozen=True)
class Episode:
    """One episode to be driven."""

    task: str
    trial: int


class LiberoRobot:
    """One simulated arm. A command is held until the next one, as a velocity controller does."""

    def __init__(self, suite: str, action: ActionContract) -> None:
        self._env = LiberoEnv(suite, DEMO_PROTOCOL)
        self._action = action
        self._command = self._rest(-1.0)
        self._task = ""

    @property
    def tasks(self) -> tuple[str, ...]:
        return self._env.tasks

    @property
    def max_steps(self) -> int:
        """Control steps after which an episode counts as failed."""
        return self._env.max_decisions * self._env.steps_per_action

    def begin(self, episode: Episode) -> str:
        """Resets to the episode's official initial state and lets the objects settle. Returns the instruction."""
        self._task = episode.task
        self._env.reset(episode.task, episode.trial, seed=0)
        self._command = self._rest(-1.0)
        return self._env.instruction(episode.task)

    def observe(self) -> Observation:
        """The camera image and the state as the robot's sensors give them now."""
        return self._env.observe()

    def state(self) -> np.ndarray:
        """float32 [5]: x, y, z (m), gripper width (m), gripper velocity (m/s)."""
        return self._env.scene(self._task).robot_state()

    def move(self, velocities: dict[str, float]) -> None:
        """Takes a command: SI values by the contract's targets. Targets that are not named are at rest."""
        for index, dimension in enumerate(self._action.dimensions):
            if self._action.gripper is not None and dimension.target == "gripper":
                continue
            value = velocities.get(dimension.target, 0.0)
            self._command[index] = (value - dimension.offset) / dimension.scale

    def grip(self, opening_m: float) -> None:
        """Sends the fingers to an opening in metres: nearer to open or nearer to closed decides."""
        gripper = self._action.gripper
        if gripper is None:
            raise DataError("the contract has no gripper")
        above = abs(opening_m - gripper.above_m) < abs(opening_m - gripper.below_m)
        self._command[-1] = 1.0 if above else -1.0

    def step(self) -> bool:
        """One control step (1/20 s) of the present command; True when the task is done."""
        return self._env.scene(self._task).hold(np.clip(self._command, -1.0, 1.0), 1)

    def expert(self) -> np.ndarray:
        """float64 [7]: what the scripted expert for LIBERO-Object would do now, in the policy's units."""
        category = self._task.removeprefix("pick_up_the_").removesuffix("_and_place_it_in_the_basket")
        aux = self._env.aux()
        return LiberoObjectExpert(category).act(self.state(), aux[:3], aux[3:])

    def close(self) -> None:
        self._env.close()

    def _rest(self, gripper: float) -> np.ndarray:
        command = np.zeros(len(self._action.dimensions))
        command[-1] = gripper
        return command
