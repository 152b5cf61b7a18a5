"""LIBERO's protocols, and the real simulator against the official environment."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.benchmarks.libero import (
    DEMO_PROTOCOL,
    MAX_STEPS,
    PUBLISHED_PROTOCOL,
    SUITES,
    SWAPPED_SUITES,
    LiberoEnv,
    environment_action,
)
from evaluation.experts.libero import LiberoObjectExpert
from vla_policy.core.errors import DataError

MILK = "pick_up_the_milk_and_place_it_in_the_basket"


@pytest.mark.parametrize(("given", "expected"), [(0.0, 1.0), (0.49, 1.0), (0.51, -1.0), (1.0, -1.0)])
def test_openvla_gripper_is_binarised_and_turned_round(given: float, expected: float) -> None:
    # Published convention: 1 opens, 0 closes. The simulator's: -1 opens, +1 closes.
    command = environment_action(np.array([0.1, -0.2, 2.0, 0.0, 0.0, 0.0, given]), PUBLISHED_PROTOCOL)
    np.testing.assert_array_equal(command, [0.1, -0.2, 1.0, 0.0, 0.0, 0.0, expected])


def test_demo_gripper_is_passed_through() -> None:
    assert environment_action(np.array([0, 0, 0, 0, 0, 0, 0.25]), DEMO_PROTOCOL)[6] == 0.25


@pytest.mark.parametrize("action", [np.zeros(6), np.zeros((1, 7)), np.array([0, 0, 0, 0, 0, 0, np.nan])])
def test_bad_actions_are_refused(action: np.ndarray) -> None:
    with pytest.raises(DataError, match="7 finite numbers"):
        environment_action(action, DEMO_PROTOCOL)


def test_protocols_have_the_official_constants() -> None:
    published = PUBLISHED_PROTOCOL
    assert (published.image_size, published.wait_steps, published.crop_area) == (256, 10, 0.9)
    assert MAX_STEPS == {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}


def test_an_unknown_suite_is_named() -> None:
    with pytest.raises(DataError, match="'libero_objects' is unknown; choose from: libero_spatial"):
        LiberoEnv("libero_objects")


@pytest.fixture(scope="module")
def demo_env() -> LiberoEnv:
    pytest.importorskip("libero", reason="LIBERO is an optional extra")
    return LiberoEnv("libero_object", DEMO_PROTOCOL)


def test_points_are_found_in_the_image(demo_env: LiberoEnv) -> None:
    """What changes in the picture when an object vanishes lies about where the object is said to be seen."""
    demo_env.reset(MILK, 0, 0)
    scene = demo_env.scene(MILK)
    for name in (name for name in scene.objects() if name != "basket_1"):
        place, with_it = scene.position(name), scene.render().astype(int)
        scene.place(name, place - [0, 0, 5], 0.0)
        changed = np.argwhere(np.abs(scene.render() - with_it).max(-1) > 10)
        scene.place(name, place, 0.0)
        middle = (np.median(changed, axis=0)[::-1] + 0.5) / 224
        np.testing.assert_allclose(scene.in_image(place[None])[0], middle, atol=0.03, err_msg=name)


@pytest.mark.parametrize("suite", SUITES + SWAPPED_SUITES)
def test_every_suite_has_ten_tasks_with_initial_states(suite: str) -> None:
    pytest.importorskip("libero", reason="LIBERO is an optional extra")
    env = LiberoEnv(suite, PUBLISHED_PROTOCOL)
    assert len(env.tasks) == 10
    assert env.max_decisions == MAX_STEPS[suite.removesuffix("_swap")]
    for task in env.tasks:
        assert len(env.initial_states(task)) == 50
        assert env.instruction(task).islower()


def test_trials_and_tasks_that_do_not_exist_are_refused(demo_env: LiberoEnv) -> None:
    with pytest.raises(DataError, match="task 'fly' is unknown"):
        demo_env.reset("fly", 0, 0)
    with pytest.raises(DataError, match="trial 50 does not exist; there are 50"):
        demo_env.reset(MILK, 50, 0)


def test_episodes_are_reproducible_and_the_expert_succeeds(demo_env: LiberoEnv) -> None:
    assert demo_env.max_decisions == 70
    other = demo_env.reset(MILK, 4, 0)
    other_state = demo_env.initial_state()
    first = demo_env.reset(MILK, 3, 0)
    first_state = demo_env.initial_state()
    assert first_state != other_state
    assert first.state is not None and other.state is not None
    assert first.state.dtype == np.float32 and first.state.shape == (5,)
    assert 0.07 < first.state[3] <= 0.081  # the Panda's gripper opens 8 cm
    expert = LiberoObjectExpert("milk")
    seen, success = first, False
    for _ in range(demo_env.max_decisions):
        assert seen.state is not None
        result = demo_env.step(expert.act(seen.state, *np.split(demo_env.aux(), 2)))
        seen, success = result.observation, result.success
        if result.done:
            break
    assert success
    # Played episodes leave nothing behind.
    again = demo_env.reset(MILK, 3, 0)
    assert demo_env.initial_state() == first_state
    np.testing.assert_array_equal(again.image, first.image)


def test_an_episode_ends_with_its_decisions(demo_env: LiberoEnv) -> None:
    demo_env.reset(MILK, 0, 0)
    demo_env.max_decisions = 2
    rest = np.array([0, 0, 0, 0, 0, 0, -1.0])
    assert [demo_env.step(rest).done for _ in range(2)] == [False, True]


def test_images_and_motion_are_those_of_the_official_environment() -> None:
    """The official environment renders bottom-up; OpenVLA turns its frames by 180 degrees."""
    pytest.importorskip("libero", reason="LIBERO is an optional extra")
    from libero.libero import get_libero_path
    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (4, 7))
    ours = LiberoEnv("libero_object", replace(PUBLISHED_PROTOCOL, crop_area=None, state="full", wrist=True))
    initial_state = ours.initial_states(MILK)[2]
    ours.reset(MILK, 2, 0)
    seen = [ours.step(action).observation for action in actions][-1]
    ours.close()  # robosuite draws into whatever context is current, so one renderer at a time
    official = OffScreenRenderEnv(
        bddl_file_name=str(Path(get_libero_path("bddl_files")) / "libero_object" / f"{MILK}.bddl"),
        camera_names=["agentview", "robot0_eye_in_hand"],
        camera_heights=256,
        camera_widths=256,
    )
    official.reset()
    official.set_init_state(initial_state)
    for _ in range(10):
        official.step([0, 0, 0, 0, 0, 0, -1])
    expected = [official.step([*a[:6], -np.sign(2 * a[6] - 1)])[0] for a in actions][-1]
    official.close()
    for name, own in zip(("agentview", "robot0_eye_in_hand"), seen.images, strict=True):
        image = expected[f"{name}_image"][::-1, ::-1].astype(int)
        assert image.std() > 25
        assert np.abs(image - own).mean() < 3  # edges differ: no multisampling
        assert np.abs(image[:, ::-1] - own).mean() > 10
    assert seen.state is not None
    np.testing.assert_allclose(seen.state[:3], expected["robot0_eef_pos"], atol=2e-3)
    attitude = quat2axisangle(expected["robot0_eef_quat"])
    assert np.linalg.norm(attitude) > 1
    np.testing.assert_allclose(seen.state[3:6], attitude, atol=5e-3)
    np.testing.assert_allclose(seen.state[6:], expected["robot0_gripper_qpos"], atol=1e-3)
