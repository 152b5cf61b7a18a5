"""Meta-World (metaworld 3.1.1) tasks whose outcome one small image and the robot's state decide.

Placements are Meta-World's own: the vector that places object and goal is uniform in the task's reset space. Only who
draws it differs: a generator seeded by (task, seed), so that one number names one initial state.
"""

import hashlib
import zlib
from typing import Any

import numpy as np

from evaluation.benchmarks.base import StepResult, project
from vla_policy.core.errors import DataError
from vla_policy.core.image import rotate_180
from vla_policy.core.observation import Observation

STEPS_PER_ACTION = 3
MAX_STEPS = 300  # Meta-World allows 500; every expert needs fewer than 150 from the official start
IMAGE_SIZE = 224
_ACTION_DIM = 4  # dx, dy, dz in centimetres per simulator step, gripper effort; each in [-1, 1]

# Placement seeds of evaluations stay below, those of training at or above: none is shared, by construction.
FIRST_TRAINING_SEED = 1_000_000_000
_TRIALS_PER_SEED = 1000

INSTRUCTIONS = {
    "button-press-topdown": "press the button down from the top",
    "button-press": "push the button on the front",
    "drawer-open": "open the drawer",
    "drawer-close": "close the drawer",
    "window-open": "slide the window open",
    "window-close": "slide the window closed",
    "door-open": "open the door of the safe",
    "door-close": "close the door of the safe",
    "plate-slide": "slide the plate into the goal",
    "handle-press": "press the handle down",
    "faucet-open": "turn the faucet on",
    "faucet-close": "turn the faucet off",
}

# The view of Meta-World's multi-task literature, moved closer: at 112 px the handles remain visible.
_CAMERA = "corner2"
_CAMERA_POSITION_M = (0.75, 0.075, 0.7)


def placement_seed(seed: int, trial: int) -> int:
    """The number of the placement for an evaluation's `seed` and `trial`; never one that training uses."""
    placement = seed * _TRIALS_PER_SEED + trial
    if not (0 <= trial < _TRIALS_PER_SEED and 0 <= placement < FIRST_TRAINING_SEED):
        raise DataError(
            f"seed {seed}, trial {trial}: expected 0 <= trial < {_TRIALS_PER_SEED} and "
            f"0 <= seed < {FIRST_TRAINING_SEED // _TRIALS_PER_SEED}; higher numbers are training placements"
        )
    return placement


class MetaWorldScene:
    """One task in one simulator with one renderer. Close it before the next: one renderer per process is reliable."""

    def __init__(self, task: str) -> None:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        self.task = task
        self._env = _observable(ALL_V3_ENVIRONMENTS[f"{task}-v3"]())
        model = self._env.model
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        self._camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, _CAMERA)
        model.cam_pos[self._camera] = _CAMERA_POSITION_M
        self._renderer = mujoco.Renderer(model, IMAGE_SIZE, IMAGE_SIZE)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0
        self.vector = np.zeros(39)
        self.success = False

    def reset(self, seed: int) -> np.ndarray:
        """Places hand and objects as `seed` says; the placement vector, float64, metres, names the initial state."""
        space = self._env._random_reset_space
        rng = np.random.default_rng([zlib.crc32(self.task.encode()), seed])
        placement = rng.uniform(space.low, space.high)
        self._env._last_rand_vec = placement.copy()
        self.vector, _ = self._env.reset()
        self.vector[36:39] = self._env._target_pos
        self.success = False
        return placement

    @property
    def target(self) -> np.ndarray:
        """Where the object to act on is, float64 [3], metres, world frame."""
        return self.vector[4:7].copy()

    @property
    def goal(self) -> np.ndarray:
        """Where it shall be, float64 [3], metres, world frame."""
        return np.array(self._env._target_pos, np.float64)

    def step(self, action: np.ndarray, steps: int = STEPS_PER_ACTION) -> bool:
        """Holds `action` (dx, dy, dz, gripper in [-1, 1]) for `steps` simulator steps; True once the task is done."""
        command = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        for _ in range(steps):
            self.vector, _, _, _, info = self._env.step(command)
            self.success = self.success or bool(info["success"])
        return self.success

    def render(self) -> np.ndarray:
        """uint8 [224, 224, 3]. The camera hangs upside down in Meta-World, so the image is turned by 180 degrees."""
        self._renderer.update_scene(self._env.data, camera=self._camera)
        return rotate_180(self._renderer.render())

    def in_image(self, points: np.ndarray) -> np.ndarray:
        """float64 [N, 2]: where points [N, 3] (metres) are in `render`'s image, from (0, 0) upper left to (1, 1)."""
        return 1 - project(self._env.model, self._env.data, self._camera, points)

    def state(self) -> np.ndarray:
        """float32 [5]: hand x, y, z and gripper width in metres, the width's velocity in m/s."""
        data = self._env.data
        gap = data.body("rightclaw").xpos - data.body("leftclaw").xpos
        width = float(np.linalg.norm(gap))
        right, left = (_linear_velocity(self._env.model, data, name) for name in ("rightclaw", "leftclaw"))
        return np.array([*self._env.get_endeff_pos(), width, float(gap @ (right - left)) / width], np.float32)

    def close(self) -> None:
        """Frees the renderer's context and the simulator."""
        self._renderer.close()
        self._env.close()


class MetaWorldEnv:
    """The benchmark: the present task's scene, replaced when another task starts."""

    name = "metaworld"
    tasks = tuple(INSTRUCTIONS)

    def __init__(self, steps_per_action: int = STEPS_PER_ACTION) -> None:
        self.steps_per_action = steps_per_action
        self.max_decisions = MAX_STEPS // steps_per_action
        self._scene: MetaWorldScene | None = None
        self._initial_state = ""
        self._decisions = 0

    def instruction(self, task: str) -> str:
        if task not in INSTRUCTIONS:
            raise DataError(f"Meta-World task {task!r} is unknown; choose from: {', '.join(INSTRUCTIONS)}")
        return INSTRUCTIONS[task]

    def reset(self, task: str, trial: int, seed: int) -> Observation:
        """Starts an episode at an evaluation placement."""
        self.place(task, placement_seed(seed, trial))
        return self.start()

    def place(self, task: str, placement: int) -> None:
        """Sets up a numbered placement; `FIRST_TRAINING_SEED` and above are for training."""
        self.instruction(task)
        if self._scene is None or self._scene.task != task:
            self.close()
            self._scene = MetaWorldScene(task)
        vector = self._scene.reset(placement)
        self._initial_state = hashlib.sha256(task.encode() + vector.tobytes()).hexdigest()

    def start(self) -> Observation:
        """Declares the simulator's present state the start of an episode."""
        self._decisions = 0
        self.scene.success = False
        return self._observation()

    def initial_state(self) -> str:
        return self._initial_state

    def step(self, action: np.ndarray) -> StepResult:
        if np.shape(action) != (_ACTION_DIM,) or not np.isfinite(action).all():
            raise DataError(f"Meta-World: expected an action of {_ACTION_DIM} finite values, got {action}")
        success = self.scene.step(action, self.steps_per_action)
        self._decisions += 1
        return StepResult(self._observation(), success, success or self._decisions >= self.max_decisions)

    def aux(self) -> np.ndarray:
        return np.concatenate([self.scene.target, self.scene.goal]).astype(np.float32)

    def close(self) -> None:
        if self._scene is not None:
            self._scene.close()
            self._scene = None

    @property
    def scene(self) -> MetaWorldScene:
        """The running task's simulator; scripted experts read its `vector`. Raises DataError before a reset."""
        if self._scene is None:
            raise DataError("Meta-World: no episode is running; call reset first")
        return self._scene

    def _observation(self) -> Observation:
        return Observation(self.scene.render(), INSTRUCTIONS[self.scene.task], self.scene.state())


def _observable(env: Any) -> Any:
    """Meta-World's environment with the goal in its observation and the placement vector set from outside."""
    env._partially_observable = False
    env.__dict__.pop("sawyer_observation_space", None)
    env._set_task_called = True
    env._freeze_rand_vec = True
    return env


def _linear_velocity(model: Any, data: Any, body: str) -> np.ndarray:
    import mujoco

    velocity = np.zeros(6)
    mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_XBODY, data.body(body).id, velocity, 0)
    return velocity[3:]
