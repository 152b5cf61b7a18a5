"""pi0.5's port against numbers of the published code, and against the published tensor list."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_pi05 import DATA, assert_matches, golden, golden_config, golden_images, golden_tensors, normal
from safetensors.torch import save_file
from torch import Tensor

from calibrator.families import find_family, live_units, load_policy
from calibrator.families.loading import empty_policy
from calibrator.families.pi05 import Pi05
from calibrator.families.pi05.model import Cache
from calibrator.families.pi05.time import condition, embedding
from calibrator.modules.gemma import Modulation, rotation
from vla_policy.core.flow.conventions import CONVENTIONS
from vla_policy.core.flow.images import pixel_values, preprocess
from vla_policy.core.policy_config import PolicyConfig

SMALL, WIDE, TOWER = golden("pi05_seed1"), golden("pi05_wide_seed1"), golden("pi05_siglip_so400m_seed1")
CAMERAS = {"one_camera": 1, "two_cameras": 2}


@dataclass(frozen=True)
class Case:
    """A policy and its inputs, with what the published code makes of them."""

    policy: Pi05
    pixels: Tensor
    ids: Tensor
    noise: Tensor
    wanted: dict[str, Any]

    @cached_property
    @torch.no_grad()
    def sequence(self) -> Tensor:
        """What enters the prefix."""
        return self.policy.embed(self.policy.project(self.policy.vision(self.pixels)), self.ids)

    @cached_property
    @torch.no_grad()
    def cache(self) -> Cache:
        """Keys and values of the prefix."""
        return self.policy.read(self.sequence)[1]


def policy_of(content: dict[str, Any], folder: Path, images: int, convention: str = "openpi") -> Pi05:
    """The golden checkpoint written to disk, dead tensors included, and loaded as a user would."""
    (folder / "config.json").write_text(json.dumps(golden_config(content, images, convention)))
    config = PolicyConfig.load(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_policy(config).state_dict().items()}
    dead = {name: torch.full(shape, torch.nan) for name, shape in find_family(config).dead_tensors(config).items()}
    assert len(shapes) + len(dead) == content["keys"] - 1  # the tied embedding counts twice there
    live = {name: torch.from_numpy(values) for name, values in golden_tensors(shapes).items()}
    save_file(live | dead, folder / "model.safetensors")
    policy = load_policy(folder)
    assert isinstance(policy, Pi05)
    return policy


@pytest.fixture(scope="module", params=[(SMALL, "one_camera"), (SMALL, "two_cameras"), (WIDE, "two_cameras")])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    content, cameras = request.param
    policy = policy_of(content, tmp_path_factory.mktemp("pi05"), CAMERAS[cameras])
    images = list(golden_images().values())[: CAMERAS[cameras]]
    pixels = torch.from_numpy(pixel_values(images, policy.config))[None]
    ids = torch.tensor(content["prompt_ids"][: content["prompt_valid"]])[None]
    return Case(policy, pixels, ids, torch.from_numpy(normal("1:noise", (1, 10, 32))), content[cameras])


@torch.no_grad()
def test_images_tower_and_projector_match_the_published_code(case: Case) -> None:
    vision = case.policy.vision
    for number, camera in enumerate(list(golden_images())[: case.policy.config.num_images]):
        pixels = case.pixels[:, 3 * number : 3 * number + 3]
        assert_matches(pixels[0], case.wanted[f"image_{camera}"])
        assert_matches(pixels[0, :, 112], case.wanted[f"image_{camera}_centre_row"])
        embedded = vision.embeddings(pixels)
        assert_matches(embedded[0], case.wanted[f"siglip_{camera}_patch_embeddings"])
        features = vision(pixels)
        assert_matches(features[0], case.wanted[f"siglip_{camera}"])
        assert_matches(case.policy.project(features)[0], case.wanted[f"projected_{camera}"])


@torch.no_grad()
def test_prefix_and_one_step_match_the_published_code(case: Case) -> None:
    policy, wanted, sequence, cache = case.policy, case.wanted, case.sequence, case.cache
    assert sequence.shape[1] == wanted["prefix_length_valid"]
    assert_matches(sequence[0], wanted["prefix_embeddings"])
    assert_matches(sequence[0, -case.ids.shape[1] :], wanted["prompt_embeddings"])
    for number in (0, 1, 2, 4):
        if f"prefix_keys_layer{number}" in wanted:
            assert_matches(cache[number][0][0, 0], wanted[f"prefix_keys_layer{number}"])
            assert_matches(cache[number][1][0, 0], wanted[f"prefix_values_layer{number}"])
    table = policy.modulations(torch.ones(1))
    x = policy.action_in_proj(case.noise)
    assert_matches(x[0], wanted["suffix_embeddings_step0"])
    first = Modulation.of(table[:, 0])
    assert_matches(first.normed(x)[0], wanted["expert_layer0_input_norm_step0"])
    assert_matches(first.gate[0], wanted["expert_layer0_input_gate_step0"])
    assert_matches(table[:, 1, 2], wanted["expert_layer0_post_gate_step0"])
    places = torch.tensor(wanted["suffix_positions"])
    turn = rotation(places, policy.config.expert.head_dim)
    for number, block in enumerate(policy.expert.layers):
        x = block(x, turn, cache[number], table[:, 2 * number : 2 * number + 2])
        if f"expert_layer{number}_output_step0" in wanted:
            assert_matches(x[0], wanted[f"expert_layer{number}_output_step0"])
    states = policy.states(case.noise, table, cache, turn)
    assert_matches(states[0], wanted["expert_final_norm_step0"])
    assert_matches(policy.action_out_proj(states)[0], wanted["velocity_step0"])


@torch.no_grad()
def test_the_integrated_actions_match_the_published_code(case: Case) -> None:
    policy, wanted = case.policy, case.wanted
    np.testing.assert_array_equal(policy.times(torch.device("cpu")), np.float32(wanted["times_10_steps"]))
    np.testing.assert_array_equal(policy.config.convention.times(4), np.float32(wanted["times_4_steps"]))
    states, actions = policy.integrated(case.noise, case.cache)
    first = case.noise - 0.1 * policy.action_out_proj(states[:, 0])
    assert_matches(first[0], wanted["actions_after_step1_of_10"])
    assert_matches(actions[0], wanted["actions_10_steps"])
    inputs = {"pixel_values": case.pixels, "input_ids": case.ids, "noise": case.noise}
    decided = policy.decide(inputs, 70).unflatten(1, (10, 7))
    np.testing.assert_allclose(decided, actions[..., :7], atol=1e-4)


@torch.no_grad()
def test_time_embedding_and_condition_match_the_published_code(case: Case) -> None:
    content = WIDE if case.policy.config.expert.hidden_size == 1024 else SMALL
    for time in ("1.0", "0.1"):
        times = torch.tensor([float(time)])
        assert_matches(embedding(times, case.policy.config)[0], content[f"time_embedding_t{time}"])
        found = condition(case.policy.get_parameter, times, case.policy.config)
        assert_matches(found[0], content[f"adarms_cond_t{time}"])


def test_the_full_size_tower_matches_the_published_code() -> None:
    from calibrator.modules.siglip import SiglipModel
    from vla_policy.core.flow.config import SiglipSpec

    with torch.device("meta"):
        tower = SiglipModel(SiglipSpec())
    prefix = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
    values = golden_tensors({prefix + name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()})
    tower.load_state_dict(
        {name.removeprefix(prefix): torch.from_numpy(tensor) for name, tensor in values.items()}, assign=True
    )
    pixels = torch.from_numpy(preprocess(golden_images()["base_0_rgb"], 224, CONVENTIONS["openpi"]))[None]
    with torch.no_grad():
        x = tower.embeddings(pixels)
        assert_matches(x[0], TOWER["base_0_rgb_hidden_0"])
        for number, block in enumerate(tower.encoder.layers):
            x = block(x)
            if (name := f"base_0_rgb_hidden_{number + 1}") in TOWER:
                assert_matches(x[0], TOWER[name])
        assert_matches(tower.post_layernorm(x)[0], TOWER["base_0_rgb_siglip"])


def test_every_published_tensor_is_live_or_known_to_be_dead() -> None:
    published = {n: tuple(s) for n, s in json.loads((DATA / "pi05_tensors.json").read_text())["pi05"].items()}
    tied = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    raw = {
        "model_type": "pi05", "convention": "openpi", "normalization": "quantiles",
        "norm_stats": {"x": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}},
    }  # fmt: skip
    config = PolicyConfig.from_dict(raw, "config.json")
    policy = empty_policy(config)
    live = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    dead = find_family(config).dead_tensors(config)
    assert live.keys().isdisjoint(dead)
    assert live | dead == {name: shape for name, shape in published.items() if name != tied}
    units = live_units(policy)
    # 27 blocks of 6 layers, patches, projector; 17 whole blocks and one of keys and values; 18 of the expert; 2 heads.
    assert len(units) == 27 * 6 + 2 + 17 * 7 + 2 + 18 * 7 + 2
