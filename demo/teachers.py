"""Training situations of a benchmark, with the scripted expert's answer to each."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from demo.layouts import BASKET, Layout, category, draw_layout, draw_yaw_rad, task_for, within_reach
from evaluation.benchmarks.base import StepResult
from evaluation.benchmarks.libero import DEMO_PROTOCOL, LiberoEnv
from evaluation.benchmarks.metaworld import FIRST_TRAINING_SEED, MetaWorldEnv
from evaluation.experts.libero import LiberoObjectExpert, hand_is_open
from evaluation.experts.metaworld import MetaWorldExpert
from vla_policy.core.observation import Observation


@dataclass(frozen=True)
class Lesson:
    """What the expert would do in one situation, for each of I instructions; the first is the episode's own.

    actions: float64 [I, K]. valid: bool [I]; False where the expert's answer to that instruction means nothing in this
    situation, never for the first. aux: float32 [I, 6], positions of target and goal, metres. seen_at: float32 [I, 2],
    the target in the image, from (0, 0) upper left to (1, 1) lower right.
    """

    actions: np.ndarray
    valid: np.ndarray
    aux: np.ndarray
    seen_at: np.ndarray


class Teacher(Protocol):
    """One benchmark as a source of episodes. Everything random comes from the generator given to `start`."""

    @property
    def name(self) -> str:
        """The benchmark's name."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task that can be taught."""
        ...

    @property
    def layout(self) -> str:
        """Where the present episode's placement comes from."""
        ...

    def start(self, task: str, rng: np.random.Generator) -> Observation:
        """Begins an episode in a new training situation."""
        ...

    @property
    def instructions(self) -> tuple[str, ...]:
        """Everything that could be asked in the present episode's scene; the first is what its task asks."""
        ...

    def lesson(self) -> Lesson:
        """The expert's answer to the present situation, for each of `instructions`."""
        ...

    def disturbed(self, action: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """What is executed instead of `action`, so that the data hold recoveries."""
        ...

    def teachable(self) -> bool:
        """False once the expert's answers mean nothing any more, for instance when the object has fallen over."""
        ...

    def step(self, action: np.ndarray) -> StepResult:
        """Executes one held action."""
        ...

    def close(self) -> None:
        """Frees the simulator."""
        ...


class LiberoTeacher:
    """LIBERO-Object with objects moved away from their official places.

    The same image with another object asked for has another answer. While the hand is empty the expert gives that one
    too: it is what makes a policy read the instruction and look.
    """

    name = "libero_object"

    # The arm starts elsewhere in half of the episodes: a random command, held this many control steps.
    _START_STEPS = 8
    _NEAR_SHARE = 0.45
    _FALLEN_RAD = 0.7
    _REST = np.array([0, 0, 0, 0, 0, 0, -1.0])

    def __init__(self) -> None:
        self._env = LiberoEnv(self.name, DEMO_PROTOCOL)
        self.tasks = self._env.tasks
        self.task = ""
        self.layout: Layout = "near"
        self.instructions: tuple[str, ...] = ()
        self._noise = 0.0

    def start(self, task: str, rng: np.random.Generator) -> Observation:
        """An official state chosen at random, its objects moved, the arm moved, everything at rest."""
        scene = self._env.scene(task)
        states = self._env.initial_states(task)
        scene.restore(states[rng.integers(len(states))])
        scene.hold(self._REST, DEMO_PROTOCOL.wait_steps)
        target = scene.of_interest()[0]
        self.task, self.layout = task, "near" if rng.random() < self._NEAR_SHARE else "wide"
        official = {name: scene.position(name) for name in scene.objects()}
        for name, place in draw_layout(official, target, self.layout, rng).items():
            scene.place(name, place, 0.0 if name == BASKET else draw_yaw_rad(rng))
        scene.hold(self._start_command(rng), self._START_STEPS)
        scene.hold(self._REST, self._START_STEPS)
        self._targets = [target] + [name for name in official if name not in (target, BASKET)]
        self._upright = [scene.vertical_axis(name) for name in self._targets]
        self._experts = [LiberoObjectExpert(category(name)) for name in self._targets]
        self.instructions = tuple(self._env.instruction(task_for(category(name))) for name in self._targets)
        self._noise = 0.0 if rng.random() < 0.15 else rng.uniform(0.05, 0.25)
        return self._env.start()

    def lesson(self) -> Lesson:
        """The expert's answers from the true positions and the robot's state."""
        scene = self._env.scene(self.task)
        state, basket = scene.robot_state(), scene.position(BASKET)
        places = [scene.position(name) for name in self._targets]
        actions = np.stack([e.act(state, place, basket) for e, place in zip(self._experts, places, strict=True)])
        aux = np.array([[*place, *basket] for place in places], np.float32)
        seen_at = scene.in_image(np.stack(places)).astype(np.float32)
        empty = hand_is_open(state) and actions[0, 6] < 0
        valid = [empty and self._upright_still(index) and within_reach(place) for index, place in enumerate(places)]
        return Lesson(actions, np.array([True, *valid[1:]]), aux, seen_at)

    def disturbed(self, action: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Gaussian noise on the motion of half the actions; now and then an open gripper begins to close."""
        executed = action.copy()
        if self._noise and rng.random() < 0.5:
            executed[:3] = np.clip(executed[:3] + rng.normal(0.0, self._noise, 3), -1.0, 1.0)
        if self._noise and executed[6] < 0 and rng.random() < 0.02:
            executed[6] = 1.0
        return executed

    def teachable(self) -> bool:
        """False once the object has fallen over."""
        return self._upright_still(0)

    def step(self, action: np.ndarray) -> StepResult:
        return self._env.step(action)

    def close(self) -> None:
        self._env.close()

    def _upright_still(self, index: int) -> bool:
        axis = self._env.scene(self.task).vertical_axis(self._targets[index])
        return float(axis @ self._upright[index]) > np.cos(self._FALLEN_RAD)

    def _start_command(self, rng: np.random.Generator) -> np.ndarray:
        command = self._REST.copy()
        if rng.random() < 0.5:
            command[:3] = rng.uniform([-0.8, -1.0, -0.6], [1.0, 1.0, 0.6])
        return command


class MetaWorldTeacher:
    """Meta-World's own placements, the hand starting elsewhere."""

    name = "metaworld"
    tasks = MetaWorldEnv.tasks
    layout = "official"

    # The hand is first moved by up to 10 cm, in steps of at most a centimetre.
    _START_STEPS = 12
    _START_LOW_M = np.array([-0.10, -0.10, -0.05])
    _START_HIGH_M = np.array([0.10, 0.05, 0.10])
    _METRES_PER_STEP = 0.01

    def __init__(self) -> None:
        self._env = MetaWorldEnv()
        self.task = ""
        self.instructions: tuple[str, ...] = ()
        self._noise = 0.0

    def start(self, task: str, rng: np.random.Generator) -> Observation:
        """A placement that no evaluation uses, and a hand on its way to somewhere."""
        self.task, self.instructions = task, (self._env.instruction(task),)
        self._env.place(task, FIRST_TRAINING_SEED + int(rng.integers(FIRST_TRAINING_SEED)))
        offset_m = rng.uniform(self._START_LOW_M, self._START_HIGH_M)
        command = np.array([*offset_m / (self._START_STEPS * self._METRES_PER_STEP), -1.0])
        self._env.scene.step(command, self._START_STEPS)
        self._expert = MetaWorldExpert(task)
        self._noise = 0.0 if rng.random() < 0.15 else rng.uniform(0.2, 0.5)
        return self._env.start()

    def lesson(self) -> Lesson:
        """The scripted policy's answer from the true positions."""
        scene = self._env.scene
        action = self._expert.act(scene.vector)
        seen_at = scene.in_image(scene.target[None]).astype(np.float32)
        return Lesson(action[None], np.array([True]), self._env.aux()[None], seen_at)

    def disturbed(self, action: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Gaussian noise on half the actions; less on the gripper."""
        if not self._noise or rng.random() < 0.5:
            return action
        return np.clip(action + rng.normal(0.0, self._noise, 4) * (1.0, 1.0, 1.0, 0.3), -1.0, 1.0)

    def teachable(self) -> bool:
        return True

    def step(self, action: np.ndarray) -> StepResult:
        return self._env.step(action)

    def close(self) -> None:
        self._env.close()
