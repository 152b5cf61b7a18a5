"""Training data and training: answers keep their image and instruction, runs continue exactly, instructions matter."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from calibrator.families.openvla import OpenVLA
from demo.batches import Batches, Prompts, patch_shares
from demo.dataset import encode_png, load_demonstrations
from demo.recipe import Recipe
from demo.tokenizer import save_tokenizer
from demo.train import Readouts, Run, initialise, loss, policy_config, train
from vla_policy.core.errors import ArtefactError, DataError
from vla_policy.core.files import sha256_policy
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prismatic.actions import ActionCodec
from vla_policy.core.prismatic.prompt import PromptTokenizer

RECIPE = Recipe(
    samples=960, batch=8, alternatives=8, warmup_steps=5, learning_rate=3e-3, ema_decay=0.9, shift_pixels=0,
    width=32, layers=1, image_size=32, patch_size=16,
)  # fmt: skip
ASKED = ("push it to the left", "push it to the right")


def write_episode(path: Path, seed: int, asked: tuple[str, ...] = ASKED, frames: int = 6) -> dict[str, np.ndarray]:
    """Random images; the first instruction's action is all -0.8, the second's all 0.8, valid in the first half."""
    rng = np.random.default_rng(seed)
    action = np.stack([np.full((frames, 4), -0.8), np.full((frames, 4), 0.8)], axis=1).astype(np.float32)
    pictures = [encode_png(image) for image in rng.integers(0, 256, (frames, 32, 32, 3), np.uint8)]
    columns = {
        "png": np.concatenate(pictures),
        "png_end": np.cumsum([len(picture) for picture in pictures]),
        "state": rng.normal(size=(frames, 5)).astype(np.float32),
        "action": action if asked == ASKED else action[:, ::-1].copy(),
        "aux": rng.normal(size=(frames, 2, 6)).astype(np.float32),
        "seen_at": rng.random((frames, 2, 2), np.float32),
        "valid": np.stack([np.ones(frames, bool), np.arange(frames) < frames // 2], axis=1),
    }
    save_file(columns, path, metadata={"instructions": json.dumps(asked)})
    return columns


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "demonstrations"
    folder.mkdir()
    write_episode(folder / "000000.safetensors", 0)
    write_episode(folder / "000001.safetensors", 1, ASKED[::-1])
    return folder


def tools(folder: Path, run: Run) -> tuple[PromptTokenizer, ActionCodec]:
    """The robot's own tokenizer and codec, which batches have to agree with."""
    config = run.policy.config
    return PromptTokenizer(folder, config, "toy"), ActionCodec.of(config, "toy")


def make(folder: Path, recipe: Recipe = RECIPE) -> tuple[Run, Batches]:
    data = load_demonstrations([folder])
    vocab = save_tokenizer(data.instructions, folder / "tokenizer.json")
    config = policy_config(data, recipe, "toy", 1, vocab)
    torch.manual_seed(0)
    policy = OpenVLA(config)
    initialise(policy)
    batches = Batches(data, config, folder, recipe, "toy")
    readouts = Readouts(recipe.width, len(data.instructions), batches.positions.shape[1])
    return Run(policy, readouts, recipe, loss, folder / "checkpoint.bin"), batches


def test_answers_keep_their_image_and_instruction(folder: Path) -> None:
    data = load_demonstrations([folder])
    assert (len(data), len(data.actions), data.episodes) == (12, 18, 2) and data.instructions == ASKED
    random = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    assert torch.equal(data.images[:6], torch.from_numpy(random))
    by_instruction = torch.where(data.instruction == 0, -0.8, 0.8)[:, None].expand(-1, 4)
    torch.testing.assert_close(data.actions, by_instruction)
    assert data.image.tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9, 10, 11]
    assert data.image[data.own].tolist() == list(range(12))
    assert data.instruction[data.own].tolist() == [0] * 6 + [1] * 6


def test_a_batch_s_rows_say_what_the_files_say(folder: Path) -> None:
    run, batches = make(folder)
    tokenizer, codec = tools(folder, run)
    batch = batches(3)
    assert batch.image[: RECIPE.batch].tolist() == list(range(RECIPE.batch)) and len(batch.ids) == 16
    words = [tokenizer.encode(text, np.zeros(5, np.float32)) for text in ASKED]
    differs = int(np.flatnonzero(words[0] != words[1])[0])
    left = batch.ids[:, differs] == int(words[0][differs])
    codes = codec.action_to_tokens(np.array([[-0.8] * 4, [0.8] * 4], np.float32))
    expected = torch.from_numpy(codes)[torch.where(left, 0, 1)]
    assert left.any() and not left.all()
    assert torch.equal(batch.tokens, expected)
    # An alternative is never the own answer of its image.
    assert (left[RECIPE.batch :] != left[batch.image[RECIPE.batch :]]).all()


def test_prompts_are_the_robot_s_own(folder: Path) -> None:
    """Instructions of different lengths, states inside, at the edges of and far beyond the statistics."""
    run, _ = make(folder)
    tokenizer, _ = tools(folder, run)
    texts = (*ASKED, "now please push it to the very left and hold it there")
    prompts = Prompts.of(tokenizer, run.policy.config, "toy", texts)
    low, high = prompts.low.float(), prompts.high.float()
    shares = torch.cat([torch.rand(40, 5, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2, torch.eye(5)])
    states, asked = low + shares * (high - low), torch.arange(len(shares)) % 3
    ids, lengths = prompts.encode(asked, states)
    for row, length, text, state in zip(ids, lengths, asked, states, strict=True):
        expected = tokenizer.encode(texts[text], state.numpy())
        assert row[:length].tolist() == expected.tolist() and not row[length:].any()


def test_a_policy_without_the_state_reads_it_off_the_image(folder: Path) -> None:
    """The prompt is the robot's own, without state; the state becomes a position to be read from the image."""
    with_state, without = make(folder)[1], make(folder, replace(RECIPE, state_in_prompt=False))
    run, batches = without
    tokenizer, _ = tools(folder, run)
    batch = batches(3)
    expected = {tuple(tokenizer.encode(text).tolist()) for text in ASKED}
    assert {tuple(row[:length].tolist()) for row, length in zip(batch.ids, batch.lengths, strict=True)} == expected
    assert (with_state(3).positions.shape, batch.positions.shape) == ((16, 6), (16, 11))
    states = batches.data.states[batches.data.image]
    torch.testing.assert_close(batches.positions[:, 6:] * (states.std(0) + 1e-3) + states.mean(0), states)
    run.advance(batch)


@pytest.mark.parametrize(("x", "y"), [(0.375, 0.625), (0.5, 0.5), (0.41, 0.83), (-0.2, 1.3), (0.01, 0.99)])
def test_patch_shares_are_bilinear(x: float, y: float) -> None:
    shares = patch_shares(torch.tensor([[[x, y], [torch.nan, 0.5]]]), 4)
    assert shares.shape == (1, 16, 2) and not shares[..., 1].any()
    grid = shares[0, :, 0].view(4, 4)
    centres = (torch.arange(4) + 0.5) / 4
    inside = [min(max(value, 0.125), 0.875) for value in (x, y)]
    means = [float((grid.sum(0) * centres).sum()), float((grid.sum(1) * centres).sum())]
    np.testing.assert_allclose([*means, float(grid.sum())], [*inside, 1.0], atol=1e-6)  # 16 float32s
    assert (grid > 1e-6).sum() <= 4


def test_a_shift_of_the_image_moves_what_is_seen(folder: Path) -> None:
    """A white pixel is where `seen_at` says, before and after the augmentation."""
    _, batches = make(folder)
    batches.recipe = Recipe(**{**vars(RECIPE), "shift_pixels": 5})
    column, row = 20, 9
    images = torch.zeros(16, 32, 32, 3, dtype=torch.uint8)
    images[:, row, column] = 255
    pixels, shift = batches._augment(images, torch.Generator().manual_seed(1))
    brightest = pixels[:, 0].flatten(1).argmax(1)
    found = torch.stack([brightest % 32, brightest // 32], 1)
    expected = (torch.tensor([column, row]) / 32 - shift) * 32
    torch.testing.assert_close(found.float(), expected)
    assert len(set(map(tuple, shift.tolist()))) > 8


def test_a_batch_is_a_function_of_the_step(folder: Path) -> None:
    _, batches = make(folder)
    assert all(torch.equal(a, b) for a, b in zip(batches(5), batches(5), strict=True))
    assert not torch.equal(batches(5).pixels, batches(6).pixels)


def test_an_interrupted_training_continues_exactly(folder: Path) -> None:
    whole, batches = make(folder)
    for step in range(6):
        whole.advance(batches(step))
    first, _ = make(folder)
    for step in range(3):
        first.advance(batches(step))
    first.save()
    second, _ = make(folder)
    second.restore()
    assert second.step == 3
    for step in range(3, 6):
        second.advance(batches(step))
    # Bit for bit: the same steps on the same processor with the same number of threads.
    for name, average in whole.average.items():
        assert torch.equal(average, second.average[name]), name


def test_another_recipe_s_checkpoint_is_refused(folder: Path) -> None:
    run, batches = make(folder)
    run.advance(batches(0))
    run.save()
    other = Run(run.policy, run.readouts, replace(RECIPE, batch=4), loss, run.checkpoint)
    with pytest.raises(ArtefactError, match="batch 8 -> 4"):
        other.restore()


def test_the_trained_policy_obeys_the_instruction(folder: Path) -> None:
    """The same images ask for opposite actions: only a policy that reads the instruction gets both right."""
    run, batches = make(folder)
    for step in range(RECIPE.steps):
        run.advance(batches(step))
    policy, data = run.averaged_policy(), batches.data
    pixels = batches(0).pixels[:1]
    tokenizer, codec = tools(folder, run)
    for instruction, value in zip(data.instructions, (-0.8, 0.8), strict=True):
        ids = torch.from_numpy(tokenizer.encode(instruction, data.states[0].numpy()))[None]
        action = codec.tokens_to_action(policy.decide({"pixel_values": pixels, "input_ids": ids}, 4)[0].numpy())
        np.testing.assert_allclose(action, value, atol=0.1)


def test_a_policy_s_training_goes_on_from_another_policy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, statistics and tokenizer are the first policy's; a learning rate of 0 leaves them as they are."""
    monkeypatch.setattr("demo.train.compile_blocks", lambda policy: None)  # a minute of a compiler for 2 steps
    episodes, first, second = tmp_path / "episodes", tmp_path / "first", tmp_path / "second"
    episodes.mkdir()
    write_episode(episodes / "000000.safetensors", 5, frames=4)
    train([folder], first, "toy", 1, replace(RECIPE, samples=16))
    train([episodes], second, "toy", 1, replace(RECIPE, samples=16, learning_rate=0.0), initial=first)
    for name in ("config.json", "tokenizer.json"):
        one, other = (json.loads((path / name).read_text()) for path in (first, second))
        one.pop("training", None)
        made = other.pop("training", None)
        assert one == other
        assert made is None or made["initial"] == sha256_policy(first)
    before, after = (load_file(path / "model.safetensors") for path in (first, second))
    assert all(torch.equal(before[name], after[name]) for name in before)
    third = tmp_path / "third"
    train([episodes], third, "toy", 1, replace(RECIPE, samples=16, state_in_prompt=False), initial=second)
    assert not PolicyConfig.load(third).state_in_prompt


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("depth=3", "unknown; choose from: seed, samples"),
        ("batch=big", "a value like 8"),
        ("batch=4.5", "a value like 8"),
        ("state_in_prompt=1", "a value like true"),
    ],
)
def test_bad_settings_are_named(change: str, message: str) -> None:
    changed = RECIPE.but(["batch=4", "learning_rate=1", "state_in_prompt=false"])
    assert changed == replace(RECIPE, batch=4, learning_rate=1.0, state_in_prompt=False)
    with pytest.raises(DataError, match=f"{change}: .*{message}"):
        RECIPE.but([change])


@pytest.mark.parametrize(
    ("column", "place", "value", "message"),
    [("action", (2, 0, 1), np.nan, "not finite"), ("valid", (1, 0), False, "lacks the answer")],
)
def test_bad_episodes_are_named(folder: Path, column: str, place: tuple[int, ...], value: float, message: str) -> None:
    path = folder / "000002.safetensors"
    columns = write_episode(path, 2)
    columns[column][place] = value
    save_file(columns, path, metadata={"instructions": json.dumps(ASKED)})
    with pytest.raises(DataError, match=f"000002.*{message}"):
        load_demonstrations([folder])


def test_a_truncated_episode_is_named(folder: Path) -> None:
    path = folder / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ArtefactError, match=r"000001.*truncated"):
        load_demonstrations([folder])
