"""The port against numbers of the published code, and against the published 7B tensor list."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from golden import DATA, golden_image, golden_numbers, golden_tensor
from safetensors.torch import save_file
from torch import Tensor

from calibrator.families import find_family, live_units, load_policy
from calibrator.families.loading import empty_policy
from calibrator.families.openvla import OpenVLA
from calibrator.families.openvla.decisions import mean_log_likelihood
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prismatic.pixels import preprocess

GOLDEN = golden_numbers()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> OpenVLA:
    """The golden checkpoint written to disk in two shards, dead tensors included, and loaded as a user would."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "config.json").write_text(json.dumps(GOLDEN["config"]))
    config = PolicyConfig.load(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_policy(config).state_dict().items()}
    shapes |= find_family(config).dead_tensors(config)
    assert len(shapes) == GOLDEN["keys"]
    names = sorted(shapes)
    weight_map = {}
    for index, shard in enumerate((names[::2], names[1::2])):
        file = f"model-{index + 1:05}-of-00002.safetensors"
        save_file({n: torch.from_numpy(golden_tensor(1, n, shapes[n])) for n in shard}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    policy = load_policy(folder)
    assert isinstance(policy, OpenVLA)
    return policy


@pytest.fixture(scope="module")
def inputs(policy: OpenVLA) -> tuple[Tensor, Tensor, Tensor]:
    pixels = torch.from_numpy(preprocess(golden_image(1), policy.config))[None]
    ids = torch.tensor(GOLDEN["input_ids"])[None]
    return pixels, ids, torch.tensor(GOLDEN["action_tokens_restricted_greedy"])[None]


def assert_matches(got: Tensor, golden: dict[str, Any]) -> None:
    """Every recorded statistic to 1e-3 of the tensor's own scale; the recorded elements likewise."""
    values = got.detach().double().numpy()
    assert list(values.shape) == golden["shape"]
    scale = golden["std"]
    assert values.mean() == pytest.approx(golden["mean"], abs=1e-3 * scale)
    assert values.std() == pytest.approx(scale, rel=1e-3)
    assert np.abs(values).max() == pytest.approx(golden["abs_max"], rel=1e-3)
    np.testing.assert_allclose(values.ravel()[:8], golden["first8"], rtol=1e-3, atol=1e-3 * scale)
    np.testing.assert_allclose(values.ravel()[-8:], golden["last8"], rtol=1e-3, atol=1e-3 * scale)


def test_every_stage_matches_the_published_code(policy: OpenVLA, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    pixels, ids, tokens = inputs
    assert_matches(pixels, GOLDEN["pixel_values"])
    features = policy.vision_backbone(pixels)
    assert_matches(features[0], GOLDEN["vision"])
    patches = policy.projector(features)
    assert_matches(patches[0], GOLDEN["projector"])

    captured: dict[str, Tensor] = {}
    layer = policy.language_model.model.layers[3]
    hook = layer.register_forward_pre_hook(lambda _, args: captured.update(entering=args[0]))
    try:
        embeddings = policy.embed(torch.cat([ids, tokens[:, :-1]], dim=1), patches)
        final = policy.hidden(embeddings)
    finally:
        hook.remove()
    assert embeddings.shape[1] == GOLDEN["sequence_length"]
    assert_matches(captured["entering"][0], GOLDEN["hidden_states_layer3_input"])
    assert_matches(final[0, -7:], GOLDEN["final_norm_readout"])

    logits = policy.output({"pixel_values": pixels, "input_ids": ids}, tokens)[0]
    assert_matches(logits, GOLDEN["teacher_forced_logits"])
    assert logits.argmax(-1).tolist() == GOLDEN["teacher_forced_logits_argmax"]
    assert mean_log_likelihood(logits[None], tokens).item() == pytest.approx(GOLDEN["J_of_action_tokens"], rel=1e-3)


def test_cached_greedy_decoding_gives_exactly_the_published_tokens(
    policy: OpenVLA, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    pixels, ids, tokens = inputs
    assert torch.equal(policy.decide({"pixel_values": pixels, "input_ids": ids}, 7), tokens)


def test_the_image_reaches_the_decision(policy: OpenVLA, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    black, white = (
        torch.from_numpy(preprocess(np.full((64, 64, 3), level, np.uint8), policy.config))[None] for level in (0, 255)
    )
    _, ids, _ = inputs
    decided = [policy.decide({"pixel_values": pixels, "input_ids": ids}, 7) for pixels in (black, white)]
    assert not torch.equal(*decided)


def test_7b_tensors_match_with_nothing_missing_or_left_over() -> None:
    published = {n: tuple(s) for n, s in json.loads((DATA / "openvla_7b_tensors.json").read_text()).items()}
    config = PolicyConfig.from_dict(GOLDEN["config"] | {"text_config": {}}, "config.json")
    policy = empty_policy(config)
    live = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    dead = find_family(config).dead_tensors(config)
    assert live.keys().isdisjoint(dead)
    assert live | dead == published
    units = live_units(policy)
    assert len(units) == 426
    unread = (32_064 - 256) * 4096  # the head's rows that decide no action
    assert sum(unit.params for unit in units) == 7_365_240_320 - unread
    assert sum(unit.module.weight.numel() for unit in units) == 7_365_240_320
