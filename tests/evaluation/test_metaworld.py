"""The real simulator: one renderer, reproducible placements, the scripted expert through the very interface."""

import numpy as np
import pytest

from evaluation.benchmarks.metaworld import FIRST_TRAINING_SEED, INSTRUCTIONS, MetaWorldEnv, placement_seed
from evaluation.experts.metaworld import MetaWorldExpert
from vla_policy.core.errors import DataError

pytest.importorskip("metaworld")


def play_expert(env: MetaWorldEnv, task: str, trial: int) -> bool:
    expert = MetaWorldExpert(task)
    env.reset(task, trial, seed=3)
    while True:
        result = env.step(expert.act(env.scene.vector))
        if result.done:
            return result.success


def test_evaluation_and_training_placements_are_disjoint() -> None:
    assert placement_seed(7, 3) == 7003
    assert len({placement_seed(seed, trial) for seed in (0, 1, 2) for trial in range(1000)}) == 3000
    assert placement_seed(FIRST_TRAINING_SEED // 1000 - 1, 999) < FIRST_TRAINING_SEED
    for seed, trial in [(FIRST_TRAINING_SEED // 1000, 0), (-1, 5), (0, 1000), (0, -1)]:
        with pytest.raises(DataError, match="training placements"):
            placement_seed(seed, trial)


def test_images_are_upright_sharp_and_named_by_seed_and_trial() -> None:
    env = MetaWorldEnv()
    first = env.reset("button-press-topdown", trial=0, seed=3)
    state = env.initial_state()
    other = env.reset("button-press-topdown", trial=1, seed=3)
    assert env.initial_state() != state
    assert np.abs(other.image.astype(int) - first.image).max() > 50
    again = env.reset("button-press-topdown", trial=0, seed=3)
    seen_at = env.scene.in_image(env.scene.target[None])[0]
    assert env.initial_state() == state
    np.testing.assert_array_equal(again.image, first.image)
    np.testing.assert_array_equal(again.state, first.state)
    env.close()

    assert first.image.shape == (224, 224, 3) and first.image.dtype == np.uint8
    assert 60 < first.image.mean() < 150 and first.image.std() > 25
    # The button is red and stands on a yellow box, so red lies above yellow, right of the red arm.
    red, green, blue = (first.image[..., channel].astype(int) for channel in range(3))
    button = np.argwhere((red > 120) & (green < 50) & (blue < 50) & (np.arange(224) > 110))
    box = np.argwhere((red > 150) & (green > 100) & (blue < 60))
    assert len(button) > 20 and len(box) > 100
    assert button[:, 0].mean() < box[:, 0].mean() - 5
    np.testing.assert_allclose(seen_at, (button.mean(0)[::-1] + 0.5) / 224, atol=0.03)


def test_state_is_metric_and_follows_the_hand() -> None:
    env = MetaWorldEnv()
    start = env.reset("drawer-open", trial=0, seed=3).state
    assert start is not None and start.dtype == np.float32
    assert 0.09 < start[3] < 0.11  # an open gripper is 10 cm wide
    up = env.step(np.array([0.0, 0.0, 1.0, -1.0])).observation.state
    assert up is not None and 0.005 < up[2] - start[2] < 0.03  # three steps of at most a centimetre
    closing = env.step(np.array([0.0, 0.0, 0.0, 1.0])).observation.state
    assert closing is not None and closing[4] < -0.05 and closing[3] < up[3]
    assert env.aux().shape == (6,)
    env.close()


@pytest.mark.parametrize("task", ["button-press-topdown", "drawer-open", "plate-slide", "faucet-close"])
def test_the_expert_succeeds_and_an_idle_hand_does_not(task: str) -> None:
    env = MetaWorldEnv()
    assert all(play_expert(env, task, trial) for trial in range(3))
    env.reset(task, trial=0, seed=3)
    idle = [env.step(np.zeros(4)) for _ in range(5)]
    assert not any(result.success or result.done for result in idle)
    env.close()


def test_an_episode_ends_when_its_decisions_are_spent() -> None:
    env = MetaWorldEnv(steps_per_action=100)
    env.reset("window-open", trial=0, seed=3)
    assert [env.step(np.zeros(4)).done for _ in range(3)] == [False, False, True]
    env.close()


def test_mistakes_are_named() -> None:
    env = MetaWorldEnv()
    with pytest.raises(DataError, match="'fly' is unknown; choose from: button-press-topdown"):
        env.reset("fly", 0, 0)
    with pytest.raises(DataError, match="call reset first"):
        env.step(np.zeros(4))
    env.reset("drawer-open", 0, 0)
    for action in (np.zeros(7), np.array([0, 0, np.nan, 0])):
        with pytest.raises(DataError, match="4 finite values"):
            env.step(action)
    env.close()


def test_instructions_are_distinct() -> None:
    assert len(set(INSTRUCTIONS.values())) == len(INSTRUCTIONS)
