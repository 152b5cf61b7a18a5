"""Training the small pi0.5 policy: what a chunk's rows are, and a run that is interrupted, continues and is loaded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from calibrator.families import TorchActor, load_policy
from calibrator.families.openvla import OpenVLA
from calibrator.families.pi05 import Pi05
from demo.dataset import Demonstrations, load_demonstrations
from demo.flow import FlowBatches, chunks_of, policy_config, save_tokenizer, train
from demo.recipe import FlowRecipe
from demo.transplant import transplant
from vla_policy.core.errors import PolicyError
from vla_policy.core.families.pi05 import scaling_of
from vla_policy.core.flow.prompt import FlowPrompt
from vla_policy.core.observation import Observation
from vla_policy.core.prismatic.prompt import PromptTokenizer

EPISODES, POLICY = Path("demo/episodes/libero_object"), Path("demo/policies/libero_object")
KEY = "libero_object"
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


def test_without_the_state_the_readout_says_where_the_hand_is(tmp_path: Path) -> None:
    """The prompt has the instruction alone; of positions beside target and goal also the robot's own, standardised."""
    data, recipe = load_demonstrations([EPISODES]), replace(RECIPE, state_in_prompt=False)
    save_tokenizer(data.instructions, tmp_path / "tokenizer.json")
    config = policy_config(data, recipe, "toy", 4)
    assert not config.takes_state
    batches = FlowBatches(data, config, tmp_path, recipe, "toy")
    batch = batches(7)
    bare = {tuple(batches.prompt.encode(text, None).tolist()) for text in data.instructions}
    shown = [tuple(ids[:length].tolist()) for ids, length in zip(batch.ids, batch.lengths, strict=True)]
    assert set(shown) <= bare and batch.ids.shape[1] == max(map(len, bare))
    hand = data.states[data.image].numpy()
    expected = (hand - hand.mean(0)) / (hand.std(0, ddof=1) + 1e-3)
    np.testing.assert_allclose(batches.positions[:, 6:], expected, rtol=1e-4, atol=1e-4)
    assert batch.positions.shape == (6, 11)


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


@torch.no_grad()
def test_a_policy_begins_with_what_another_knows(tmp_path: Path) -> None:
    """On the other's own sequence, read from left to right as it reads it, the prefix makes the other's hidden states;
    its tower's patches come close to the other's two towers', and the prompt's words and bins are the other's."""
    data, recipe = load_demonstrations([EPISODES]), FlowRecipe()
    source = load_policy(POLICY)
    assert isinstance(source, OpenVLA)
    tokenizer = save_tokenizer(data.instructions, tmp_path / "tokenizer.json")
    policy = Pi05(policy_config(data, recipe, KEY, 4, source.config.stats(KEY).proprio))
    pixels = data.images[::20].permute(0, 3, 1, 2) / 127.5 - 1
    transplant(source, POLICY / "tokenizer.json", policy, tokenizer, pixels[1:])

    means, deviations = (
        torch.tensor([v for tower in source.config.towers for v in getattr(tower, name)])[:, None, None]
        for name in ("mean", "std")
    )
    wanted = source.patches(((pixels + 1) / 2).repeat(1, 2, 1, 1).sub(means).div(deviations))
    found = policy.project(policy.vision(pixels))
    # The one tower of the two, through one layer in place of three: 5 % of the variance is what it does not tell.
    assert float((found[0] - wanted[0]).square().mean() / wanted.var()) < 0.1

    # Centres of pi0.5's bins, which lie elsewhere than OpenVLA's.
    normalised = (np.array([20, 77, 128, 200, 250]) + 0.5) / 128 - 1
    proprio = source.config.stats(KEY).proprio
    assert proprio is not None
    low, high = np.array(proprio.low), np.array(proprio.high)
    state = low + (normalised + 1) / 2 * (high - low)
    ids = PromptTokenizer(POLICY, source.config, KEY).encode("pick up the butter", state)
    sequence = source.embed(torch.from_numpy(ids)[None], wanted[:1])
    later = torch.full((sequence.shape[1],) * 2, -torch.inf).triu(1)
    entering, _ = policy.read(sequence, later[None, None])
    states = source.decoder(inputs_embeds=sequence, output_hidden_states=True).hidden_states
    for own, its in zip(entering, states, strict=False):
        # SiLU is met by GELU's approximation.
        assert float((own - its).norm() / its.norm()) < 3e-3

    mine = scaling_of(policy.config.stats(KEY).proprio, policy.config).normalised(state)
    prompt = FlowPrompt(tmp_path / "tokenizer.json", policy.config).encode("pick up the butter", mine)
    words = policy.embed(found[:1, :0], torch.from_numpy(prompt)[None])[0]
    bins = source.decoder.embed_tokens(torch.from_numpy(ids[-6:-1]))
    torch.testing.assert_close(words[-8:-3], bins, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(words[-1], source.decoder.embed_tokens(torch.tensor(ids[-1])), rtol=1e-5, atol=1e-6)


def test_a_policy_of_another_family_is_no_beginning(tmp_path: Path) -> None:
    flow = Path("demo/policies/libero_object_pi05")
    with pytest.raises(PolicyError, match=r"libero_object: a policy of the family 'openvla'; expected 'pi05'"):
        train([EPISODES], tmp_path / "policy", KEY, 4, RECIPE, initial=POLICY)
    with pytest.raises(PolicyError, match=r"libero_object_pi05: a policy of the family 'pi05'; expected 'openvla'"):
        train([EPISODES], tmp_path / "policy", KEY, 4, RECIPE, start=flow)


def test_a_start_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"--start: text_config.hidden_size is 192 there, 96 here"):
        train([EPISODES], tmp_path / "policy", KEY, 4, RECIPE, start=POLICY)
