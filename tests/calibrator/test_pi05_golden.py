"""The ports of pi0.5 and pi0 against numbers of the published code, and against the published tensor lists."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_pi05 import (
    DATA,
    assert_matches,
    golden,
    golden_config,
    golden_images,
    golden_state,
    golden_tensors,
    normal,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from calibrator.families import find_family, live_units, load_policy
from calibrator.families.loading import empty_policy, fill_policy
from calibrator.families.pi05 import Pi05
from calibrator.families.pi05.model import PROJECTOR, VISION, Cache
from calibrator.families.pi05.time import condition, embedding
from calibrator.modules.chain import PROMPT
from calibrator.modules.gemma import modulation, rotation
from calibrator.modules.siglip import SiglipModel
from vla_policy.core.families.pi05 import STATE
from vla_policy.core.flow.config import SiglipSpec
from vla_policy.core.flow.conventions import CONVENTIONS
from vla_policy.core.flow.images import pixel_values, preprocess
from vla_policy.core.flow.statistics import state_row
from vla_policy.core.policy_config import PolicyConfig

SMALL, WIDE, TOWER = golden("pi05_seed1"), golden("pi05_wide_seed1"), golden("pi05_siglip_so400m_seed1")
PI0 = golden("pi0_seed1")
CAMERAS = {"one_camera": 1, "two_cameras": 2}


@dataclass(frozen=True)
class Case:
    """A policy and its inputs, with what the published code makes of them."""

    policy: Pi05
    pixels: Tensor
    ids: Tensor
    noise: Tensor
    state: Tensor | None
    content: dict[str, Any]
    cameras: str

    @property
    def wanted(self) -> dict[str, Any]:
        wanted: dict[str, Any] = self.content[self.cameras]
        return wanted

    @cached_property
    @torch.no_grad()
    def features(self) -> Tensor:
        """The tower's, of all cameras."""
        return self.policy.vision(self.pixels)

    @cached_property
    @torch.no_grad()
    def sequence(self) -> Tensor:
        """What enters the prefix."""
        return self.policy.embed(self.policy.project(self.features), self.ids)

    @cached_property
    @torch.no_grad()
    def cache(self) -> Cache:
        """Keys and values of the prefix."""
        return self.policy.read(self.sequence)[1]


def policy_of(content: dict[str, Any], folder: Path, images: int, convention: str = "openpi") -> Pi05:
    """The golden policy: a small one is written, dead tensors included, and loaded as a user would."""
    raw = golden_config(content, images, convention)
    config = PolicyConfig.from_dict(raw, "config.json")
    empty = empty_policy(config)
    live, dead = drawn(empty), find_family(config).dead_tensors(config)
    assert len(live) + len(dead) == content["keys"] - 1  # the tied embedding counts twice there
    if content is WIDE:  # more than 1 GB
        policy = fill_policy(empty, live, "cpu")
    else:
        (folder / "config.json").write_text(json.dumps(raw))
        unread = {name: torch.full(shape, torch.nan) for name, shape in dead.items()}
        save_file(live | unread, folder / "model.safetensors")
        policy = load_policy(folder)
    assert isinstance(policy, Pi05)
    return policy


def pixels_of(policy: Pi05) -> Tensor:
    """The golden images of its cameras, by its convention."""
    images = list(golden_images().values())[: policy.config.num_images]
    return torch.from_numpy(pixel_values(images, policy.config))[None]


def drawn(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The golden weights of a module of the meta device, whose published names begin with `prefix`."""
    shapes = {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return {name.removeprefix(prefix): torch.from_numpy(values) for name, values in golden_tensors(shapes).items()}


CASES = {
    "small": (SMALL, "one_camera"),
    "small, two cameras": (SMALL, "two_cameras"),
    "wide": (WIDE, "two_cameras"),
    "pi0": (PI0, "one_camera"),
    "pi0, two cameras": (PI0, "two_cameras"),
}
RECORDED = [name for name, (content, _) in CASES.items() if "lerobot" in content]


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    content, cameras = request.param
    policy = policy_of(content, tmp_path_factory.mktemp("pi05"), CAMERAS[cameras])
    pixels = pixels_of(policy)
    ids = torch.tensor(content["prompt_ids"][: content["prompt_valid"]])[None]
    state = torch.from_numpy(state_row(golden_state(), 32)) if content is PI0 else None
    return Case(policy, pixels, ids, torch.from_numpy(normal("1:noise", (1, 10, 32))), state, content, cameras)


@torch.no_grad()
def test_images_tower_and_projector_match_the_published_code(case: Case) -> None:
    vision = case.policy.vision
    for number, camera in enumerate(list(golden_images())[: case.policy.config.num_images]):
        pixels = case.pixels[:, 3 * number : 3 * number + 3]
        assert_matches(pixels[0], case.wanted[f"image_{camera}"])
        assert_matches(pixels[0, :, 112], case.wanted[f"image_{camera}_centre_row"])
        embedded = vision.embeddings(pixels)
        assert_matches(embedded[0], case.wanted[f"siglip_{camera}_patch_embeddings"])
        features = case.features[:, 256 * number : 256 * number + 256]
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
    table = policy.timed(torch.ones(1))
    adaptive = policy.config.adaptive
    x = policy.suffix(case.noise, table, case.state)
    assert_matches(x[0], wanted["suffix_embeddings_step0"])
    first = modulation(policy.expert.layers[0].input_layernorm, table[:, 0] if adaptive else None)
    assert_matches(first.normed(x)[0], wanted["expert_layer0_input_norm_step0"])
    if adaptive:
        assert_matches(first.gate[0], wanted["expert_layer0_input_gate_step0"])
        assert_matches(table[:, 1, 2], wanted["expert_layer0_post_gate_step0"])
    places = torch.tensor(wanted["suffix_positions"])
    turn, mask = rotation(places, policy.config.expert.head_dim), policy.hidden(sequence.shape[1], x)
    for number, block in enumerate(policy.expert.layers):
        x = block(x, turn, cache[number], table[:, 2 * number : 2 * number + 2] if adaptive else None, mask)
        if f"expert_layer{number}_output_step0" in wanted:
            assert_matches(x[0], wanted[f"expert_layer{number}_output_step0"])
    states = policy.states(case.noise, table, cache, turn, mask, case.state)
    assert_matches(states[0], wanted["expert_final_norm_step0"])
    assert_matches(policy.action_out_proj(states)[0], wanted["velocity_step0"])


@torch.no_grad()
def test_the_integrated_actions_match_the_published_code(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, wanted = case.policy, case.wanted
    np.testing.assert_array_equal(policy.times(torch.device("cpu")), np.float32(wanted["times_10_steps"]))
    np.testing.assert_array_equal(policy.config.convention.times(4), np.float32(wanted["times_4_steps"]))
    states, actions = policy.integrated(case.noise, case.cache, case.state)
    first = case.noise - 0.1 * policy.action_out_proj(states[:, 0])
    assert_matches(first[0], wanted["actions_after_step1_of_10"])
    assert_matches(actions[0], wanted["actions_10_steps"])
    assert_first_values(actions, wanted)
    if case.content is not WIDE:  # the chain is put together alike at every size
        inputs = {"pixel_values": case.pixels, PROMPT: case.ids, "noise": case.noise}
        if case.state is not None:
            inputs[STATE] = case.state
        decided = policy.decide(inputs, 70).unflatten(1, (10, 7))
        np.testing.assert_allclose(decided, actions[..., :7], atol=1e-4)
    with_steps(case, 4, monkeypatch)
    assert_matches(policy.integrated(case.noise, case.cache, case.state)[1][0], wanted["actions_4_steps"])


@torch.no_grad()
@pytest.mark.parametrize("case", [CASES[name] for name in RECORDED], ids=RECORDED, indirect=True)
@pytest.mark.parametrize("images", ["same_images", "own_resize"])
def test_with_lerobot_s_ways_the_actions_are_lerobot_s(
    case: Case, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its times, each rounded once, on openpi's images; and on images that are resized as it does."""
    lerobot, policy = CONVENTIONS["lerobot"], case.policy
    monkeypatch.setattr(policy, "config", replace(policy.config, convention=lerobot))
    if images == "own_resize":
        case = replace(case, pixels=pixels_of(policy))
    wanted = case.content["lerobot"][images][case.cameras]
    states, actions = policy.integrated(case.noise, case.cache, case.state)
    assert_matches(policy.action_out_proj(states[:, 0])[0], wanted["velocity_step0"])
    assert_matches(actions[0], wanted["actions_10_steps"])
    if images == "same_images":
        assert_first_values(actions, wanted)
    with_steps(case, 4, monkeypatch)
    assert_matches(policy.integrated(case.noise, case.cache, case.state)[1][0], wanted["actions_4_steps"])


def assert_first_values(actions: Tensor, wanted: dict[str, Any]) -> None:
    """Every row's own dimensions of the robot, to 1e-3 of the chunk's scale."""
    tolerance = 1e-3 * wanted["actions_10_steps"]["std"]
    np.testing.assert_allclose(actions[0, :, :7], wanted["actions_10_steps_first7"], rtol=1e-3, atol=tolerance)


def with_steps(case: Case, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy integrates in so many steps for the rest of a test."""
    monkeypatch.setattr(case.policy, "config", replace(case.policy.config, num_inference_steps=steps))


@torch.no_grad()
def test_time_embedding_and_condition_match_the_published_code(case: Case) -> None:
    for time in ("1.0", "0.1"):
        times, policy, content = torch.tensor([float(time)]), case.policy, case.content
        assert_matches(embedding(times, policy.config)[0], content[f"time_embedding_t{time}"])
        if policy.config.adaptive:
            found = condition(policy.get_parameter, times, policy.config)
            assert_matches(found[0], content[f"adarms_cond_t{time}"])
        else:
            suffix = policy.suffix(case.noise, policy.timed(times), case.state)
            assert_matches(suffix[0], content[f"suffix_embeddings_t{time}"])


@torch.no_grad()
def test_the_full_size_tower_and_projector_match_the_published_code() -> None:
    with torch.device("meta"):
        tower, projector = SiglipModel(SiglipSpec()), nn.Linear(1152, 2048)
    tower.load_state_dict(drawn(tower, f"{VISION}."), assign=True)
    projector.load_state_dict(drawn(projector, f"{PROJECTOR}."), assign=True)
    for camera in ("base_0_rgb", "left_wrist_0_rgb"):
        pixels = torch.from_numpy(preprocess(golden_images()[camera], 224, CONVENTIONS["openpi"]))[None]
        x = tower.embeddings(pixels)
        assert_matches(x[0], TOWER[f"{camera}_hidden_0"])
        for number, block in enumerate(tower.encoder.layers):
            x = block(x)
            if (name := f"{camera}_hidden_{number + 1}") in TOWER:
                assert_matches(x[0], TOWER[name])
        features = tower.post_layernorm(x)
        assert_matches(features[0], TOWER[f"{camera}_siglip"])
        assert_matches(projector(features)[0], TOWER[f"{camera}_projected"])


@pytest.mark.parametrize("variant", ["pi05", "pi0"])
def test_every_published_tensor_is_live_or_known_to_be_dead(variant: str) -> None:
    lists = json.loads((DATA / "pi05_tensors.json").read_text())
    published = {name: tuple(shape) for name, shape in lists["pi05"].items()}
    if variant == "pi0":
        published = {name: shape for name, shape in published.items() if name not in lists["only_in_pi05"]}
        published |= {name: tuple(shape) for name, shape in lists["only_in_pi0"].items()}
        assert len(published) == 778
    tied = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    limits: dict[str, Any] = {"q01": [0.0] * 7, "q99": [1.0] * 7}
    raw = {
        "model_type": "pi05", "variant": variant, "convention": "openpi", "normalization": "quantiles",
        "norm_stats": {"x": {"action": limits, "proprio": limits | {"names": [f"s{number}" for number in range(7)]}}},
    }  # fmt: skip
    config = PolicyConfig.from_dict(raw, "config.json")
    policy = empty_policy(config)
    live = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    dead = find_family(config).dead_tensors(config)
    assert live.keys().isdisjoint(dead)
    assert live | dead == {name: shape for name, shape in published.items() if name != tied}
    units = live_units(policy)
    # 27 blocks of 6 layers, patches, projector; 17 whole blocks and one of keys and values; 18 of the expert; 2 heads,
    # of pi0 also the state's and two that join the time.
    assert len(units) == 27 * 6 + 2 + 17 * 7 + 2 + 18 * 7 + {"pi05": 2, "pi0": 5}[variant]
