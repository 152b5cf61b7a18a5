"""Strict loading: what is wrong with a checkpoint is named, and what was saved is what is loaded."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rounding import assert_clear
from safetensors.torch import load_file, save_file
from tiny import tiny_policy_folder

from calibrator.families import TorchActor, load_policy
from calibrator.families.loading import open_checkpoint
from vla_policy.core.errors import ArtefactError, DataError, EngineError, PolicyError
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_policy_folder(tmp_path / "policy")


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


NAME = "projector.fc2.weight"


def test_what_is_saved_is_loaded_in_the_published_names(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    loaded = load_policy(folder, torch.bfloat16).state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


def test_a_checkpoint_in_its_own_precision_stays_in_the_page_cache(folder: Path) -> None:
    """Its weights are mapped from the file, so a machine with less free memory than weights can still read them."""
    policy = load_policy(folder, torch.bfloat16)
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(folder / "model.safetensors"))
    ]
    for name, parameter in policy.named_parameters():
        assert any(parameter.data_ptr() in pages for pages in mapped), name


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, **{NAME: None})
    with pytest.raises(PolicyError, match=f"tensor '{NAME}' missing"):
        load_policy(folder)


def test_a_wrong_shape_is_named(folder: Path) -> None:
    rewrite(folder, **{NAME: torch.zeros(3, 5)})
    with pytest.raises(PolicyError, match=rf"tensor '{NAME}' has shape \[3, 5\], expected \[64, 512\]"):
        load_policy(folder)


def test_a_foreign_tensor_is_named(folder: Path) -> None:
    rewrite(folder, **{"language_model.model.layers.7.mlp.up_proj.weight": torch.zeros(1)})
    with pytest.raises(PolicyError, match=r"'language_model.model.layers.7.mlp.up_proj.weight' does not belong"):
        load_policy(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArtefactError, match=r"model.safetensors: damaged or truncated"):
        load_policy(folder)


@pytest.mark.parametrize(
    "part",
    [
        "action_head--150000_checkpoint.pt",
        "vision_backbone--latest_checkpoint.pt",
        "noisy_action_projector--5_checkpoint.pt",
        "adapter_config.json",
        "lora_adapter",
    ],
)
def test_a_part_that_would_be_left_out_is_named(folder: Path, part: str) -> None:
    """By whatever reads weights: the calibrator's loader and the engine's."""
    (folder / part).touch()
    with pytest.raises(ArtefactError, match=f"policy: {part} would be left out of the policy"):
        load_policy(folder)
    with (
        pytest.raises(ArtefactError, match=f"policy: {part} would be left out of the policy"),
        open_checkpoint(folder, PolicyConfig.load(folder)),
    ):
        pass


@pytest.mark.parametrize("content", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"metadata": {}}'])
def test_an_index_without_a_map_of_files_is_named(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"index\.json: no weight_map of tensors to file names; copy it again"):
        load_policy(folder)


def test_weights_that_the_index_does_not_list_are_named(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert load_policy(folder).config.action_dim == 3
    save_file({"x": torch.zeros(1)}, folder / "more.safetensors")
    with pytest.raises(ArtefactError, match=r"more.safetensors would be left out of the policy \(not listed in model"):
        load_policy(folder)
    for path in (str(folder / "model.safetensors"), "../policy/model.safetensors", "shards/model.safetensors"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, path)}))
        with pytest.raises(ArtefactError, match=f"names the file '{path}'; expected a plain name in this folder"):
            load_policy(folder)


def test_the_engine_is_not_built_from_a_foreign_tensor_either(folder: Path) -> None:
    rewrite(folder, **{"vision_backbone.featurizer.blocks.0.scale.weight": torch.zeros(16, 32)})
    with (
        pytest.raises(PolicyError, match=r"'vision_backbone.featurizer.blocks.0.scale.weight' does not belong"),
        open_checkpoint(folder, PolicyConfig.load(folder)),
    ):
        pass


def test_a_folder_without_a_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"config.json: cannot be read"):
        load_policy(tmp_path)


def test_bad_observations_are_named(folder: Path) -> None:
    actor = TorchActor.load(folder)
    image, state = np.zeros((32, 32, 3), np.uint8), np.zeros(2, np.float32)
    assert actor.act(Observation(image, "pick it up", state)).action.shape == (3,)
    with pytest.raises(DataError, match="expected uint8 RGB"):
        actor.act(Observation(image.astype(np.float32), "pick it up", state))
    with pytest.raises(DataError, match="instruction is empty"):
        actor.act(Observation(image, "  ", state))
    with pytest.raises(DataError, match=r"state: expected 2 finite values \['x', 'gripper_width'\]"):
        actor.act(Observation(image, "pick it up", np.array([0, np.nan], np.float32)))
    with pytest.raises(DataError, match="state: expected 2 finite values"):
        actor.act(Observation(image, "pick it up", None))
    with pytest.raises(PolicyError, match="unnorm_key 'bridge'"):
        TorchActor.load(folder, "bridge")


def test_cached_decoding_equals_decoding_without_a_cache(folder: Path) -> None:
    """Oracle: the whole sequence again for every token."""
    policy = load_policy(folder)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(2, 6, 32, 32, generator=generator)
    ids = torch.randint(3, 200, (2, 9), generator=generator)
    ids[:, 0] = 1
    tokens = torch.zeros(2, 0, dtype=torch.long)
    first, last = policy.config.token_vocab - 256, policy.config.token_vocab
    for _ in range(3):
        embeddings = policy.embed(torch.cat([ids, tokens], dim=1), policy.patches(pixels))
        logits = policy.language_model.lm_head(policy.hidden(embeddings)[:, -1])
        assert_clear(logits[:, first:last].numpy())
        tokens = torch.cat([tokens, first + logits[:, first:last].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(policy.decide({"pixel_values": pixels, "input_ids": ids}, 3), tokens)


@pytest.mark.parametrize("value", [float("nan"), 2e38])
def test_a_policy_whose_logits_are_not_finite_decides_nothing(value: float, folder: Path) -> None:
    """A weight that is not a number, and one that is finite and overflows."""
    head = "language_model.lm_head.weight"
    rewrite(folder, **{head: torch.full_like(load_file(folder / "model.safetensors")[head], value)})
    actor = TorchActor.load(folder)
    seen = Observation(np.zeros((32, 32, 3), np.uint8), "pick it up", np.zeros(2, np.float32))
    with pytest.raises(EngineError, match=r"torch policy: logits of the action tokens: \d+ of 768 values"):
        actor.act(seen)
    with pytest.raises(EngineError, match="torch policy: output"):
        actor.scores(seen, np.full(3, actor.config.token_vocab - 1))
