"""Training the small pi0.5 policy: what a chunk's rows are, and a run that is interrupted, continues and is loaded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from calibrator.families import TorchActor
from demo.dataset import Demonstrations, load_demonstrations
from demo.flow import FlowBatches, chunks_of, policy_config, save_tokenizer, train
from demo.recipe import FlowRecipe
from vla_policy.core.observation import Observation

EPISODES = Path("demo/episodes/libero_object")
RECIPE = FlowRecipe(
    samples=8, batch=4, alternatives=2, draws=2, warmup_steps=2, width=96, expert_width=32, layers=2, horizon=3,
    image_size=112, patch_size=28,
)  # fmt: skip


def two_episodes() -> Demonstrations:
    """Images 0 to 2 and 3 to 4; image 1 has an answer to another instruction."""
    owns = torch.tensor([0, 1, 3, 4, 5])
    return Demonstrations(
        images=torch.zeros(5, 2, 2, 3, dtype=torch.uint8),
        states=torch.zeros(5, 5),
        seen_at=torch.zeros(5, 2, 2),
        actions=torch.tensor([[0.0], [1], [100], [2], [3], [4]]),
        aux=torch.zeros(6, 6),
        instruction=torch.tensor([0, 0, 1, 0, 0, 0]),
        image=torch.tensor([0, 1, 1, 2, 3, 4]),
        episode=torch.tensor([0, 0, 0, 1, 1]),
        own=owns,
        instructions=("this", "that"),
        episodes=2,
    )


def test_a_chunk_goes_on_with_its_episode_and_nothing_is_known_behind_its_end() -> None:
    chunks, known = chunks_of(two_episodes(), 3)
    assert chunks[..., 0].tolist() == [[0, 1, 2], [1, 2, 2], [100, 100, 100], [2, 2, 2], [3, 4, 4], [4, 4, 4]]
    assert known.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]]


def test_batches_are_a_function_of_the_step(tmp_path: Path) -> None:
    data = load_demonstrations([EPISODES])
    save_tokenizer(data.instructions, tmp_path / "tokenizer.json")
    config = policy_config(data, RECIPE, "toy", 4)
    first, second = (FlowBatches(data, config, tmp_path, RECIPE, "toy") for _ in range(2))
    for one, other in zip(first(7), second(7), strict=True):
        assert torch.equal(one, other)
    batch = first(7)
    assert batch.chunk.shape == (6, 3, 7) and batch.noise.shape == (6, 2, 3, 7)
    assert not torch.equal(batch.noise, first(8).noise) and 0 < batch.times.min() < batch.times.max() <= 1
    assert batch.chunk.abs().quantile(0.9) <= 1.01, "normalised by quantiles"


def test_a_run_continues_and_its_policy_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: None)  # a minute, for two steps
    train([EPISODES], tmp_path / "whole", "toy", 4, RECIPE)
    half = FlowRecipe(**{**vars(RECIPE), "samples": 4})
    train([EPISODES], tmp_path / "policy", "toy", 4, half)
    train([EPISODES], tmp_path / "policy", "toy", 4, RECIPE)
    actors = [TorchActor.load(tmp_path / name) for name in ("whole", "policy")]
    seen = Observation(np.zeros((112, 112, 3), np.uint8), "pick up the butter", np.full(5, 0.1))
    first, second = (actor.act(seen).action for actor in actors)
    assert first.shape == (3, 7) and np.isfinite(first).all() and actors[0].config.executed == 1
    # The learning rate falls by the steps that are planned, so the halves differ a little from the whole.
    assert np.abs(first - second).max() < 0.1
