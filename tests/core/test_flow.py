"""What surrounds pi0.5's network, against numbers of openpi and lerobot: statistics, prompt, images, noise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_pi05 import assert_matches, golden, golden_config, golden_images, normal
from pi05_policy import tokenizer_of_words

from vla_policy.core.errors import ArtefactError, DataError, PolicyError
from vla_policy.core.families.pi05 import Pi05Policy, scaling_of
from vla_policy.core.flow.config import FlowConfig
from vla_policy.core.flow.conventions import CONVENTIONS
from vla_policy.core.flow.images import preprocess
from vla_policy.core.flow.noise import entry_of
from vla_policy.core.flow.prompt import FlowPrompt, state_bins
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig

IO, SMALL = golden("pi05_io"), golden("pi05_seed1")
OF_PI0 = {"variant": "pi0", "state_in_prompt": False, "normalization": "mean_std"}
RECORDED = {"openpi": IO, "lerobot": IO["lerobot_0.6.1"], "lerobot_0_4": IO["lerobot_0.4.4"]}
# lerobot computes in float32, openpi in float64; its recorded actions are float32.
TOLERANCE = {"openpi": 1e-7, "lerobot": 2e-6, "lerobot_0_4": 2e-6}


def config_of(convention: str = "openpi", **changes: Any) -> FlowConfig:
    config = PolicyConfig.from_dict(golden_config(SMALL, 1, convention, **changes), "config.json")
    assert isinstance(config, FlowConfig)
    return config


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("mode", ["quantiles", "mean_std"])
def test_statistics_and_prompt_are_those_of_the_code_that_trained(convention: str, mode: str, tmp_path: Path) -> None:
    config, recorded = config_of(convention, normalization=mode), RECORDED[convention]
    name = "quantile" if mode == "quantiles" else mode
    stats = config.stats(None)
    assert stats.proprio is not None
    state = scaling_of(stats.proprio, config).normalised(np.asarray(IO["state_raw"]))
    np.testing.assert_allclose(state, recorded[f"state_normalized_{name}"], atol=TOLERANCE[convention])
    actions = scaling_of(stats.action, config).restored(normal("1:noise", (1, 10, 32))[0, :3, :7])
    np.testing.assert_allclose(actions, recorded[f"actions_unnormalized_{name}_first7"], atol=TOLERANCE[convention])
    wanted = recorded[f"prompt_with_state_{name}"]
    words = tokenizer_of_words([wanted], tmp_path)
    prompt = FlowPrompt(tmp_path / "tokenizer.json", config)
    ids = prompt.encode("pick up the red_block and\nplace it ", state)
    spoken = wanted.replace("\n", " \n ").split(" ")
    assert [words.id_to_token(token) for token in ids.tolist()] == ["<bos>", *filter(None, spoken)]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_pi0_takes_the_state_as_a_row_and_the_bare_instruction(convention: str, tmp_path: Path) -> None:
    """Normalised as the published codes record it, filled up with zeros; no convention writes it into the prompt."""
    config = config_of(convention, **OF_PI0)
    assert config.takes_state and config.longest_prompt == 48 and config.suffix == 11
    words = tokenizer_of_words(["place it", IO["prompt_with_state_quantile"]], tmp_path)
    np.save(tmp_path / "noise.npy", np.zeros((4, 10, 32), np.float32))
    policy, image = Pi05Policy(config, tmp_path, None), np.zeros((20, 30, 3), np.uint8)
    inputs = policy.inputs(Observation(image, "place it", np.asarray(IO["state_raw"])))
    assert inputs["state"].shape == (1, 1, 32) and inputs["state"].dtype == np.float32
    wanted = np.pad(RECORDED[convention]["state_normalized_mean_std"], (0, 24))
    np.testing.assert_allclose(inputs["state"][0, 0], wanted, atol=TOLERANCE[convention] + 1e-7)
    assert [words.id_to_token(token) for token in inputs["input_ids"][0]] == ["<bos>", "place", "it", "\n"]
    for state in (np.zeros(7), np.full(8, np.nan), None):
        with pytest.raises(DataError, match="state: expected 8 finite values"):
            policy.inputs(Observation(image, "place it", state))


def test_bins_are_not_clipped() -> None:
    recorded = IO["discretize"]
    assert state_bins(np.asarray(recorded["values"])).tolist() == recorded["bins"]


def test_without_a_state_the_line_end_is_a_token_of_its_own(tmp_path: Path) -> None:
    config = config_of(state_in_prompt=False)
    assert not config.takes_state and config.state_names(None) == ()
    words = tokenizer_of_words(["place it"], tmp_path)
    ids = FlowPrompt(tmp_path / "tokenizer.json", config).encode("place it", None).tolist()
    assert ids == [words.token_to_id("<bos>"), *words.encode("place it", add_special_tokens=False).ids,
                   *words.encode("\n", add_special_tokens=False).ids]  # fmt: skip


def test_lerobot_resizes_without_antialiasing() -> None:
    recorded = SMALL["lerobot"]["own_resize"]["two_cameras"]
    for camera, image in golden_images().items():
        pixels = preprocess(image, 224, CONVENTIONS["lerobot"])
        assert_matches(pixels, recorded[f"image_{camera}"])
    wide = golden_images()["base_0_rgb"]
    padding = {name: preprocess(wide, 224, way)[0, 0, 0] for name, way in CONVENTIONS.items()}
    assert padding == {"openpi": -1, "lerobot": -1, "lerobot_0_4": -3}


def test_the_same_observation_begins_with_the_same_noise_and_any_other_may_not() -> None:
    image = golden_images()["base_0_rgb"]
    seen = Observation(image, "place it", np.zeros(8, np.float32))
    again = Observation(image.copy(), "place it", np.zeros(8))
    other = [Observation(image, f"place it {number}", np.zeros(8)) for number in range(40)]
    assert entry_of(seen, 64) == entry_of(again, 64)
    assert len({entry_of(one, 64) for one in other}) > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"convention": "jax"}, "convention: expected 'openpi' or"),
        ({"normalization": "min_max"}, "normalization: expected 'quantiles' or 'mean_std', got 'min_max'"),
        ({"n_action_steps": 11}, "n_action_steps: 11 of a chunk_size of 10 rows"),
        ({"max_action_dim": 6}, "7 values of an action, max_action_dim is 6"),
        ({"max_state_dim": 6}, "8 values of the state, max_state_dim is 6"),
        ({"norm_stats": {}}, "norm_stats is empty"),
        ({"norm_stats": {"x": {"action": {"mean": [0.0]}}}}, "norm_stats.x.action: 'q01' is missing, which"),
        ({"vision_config": {"depth": 3}}, "vision_config: depth is unknown"),
        ({"expert_config": {"num_hidden_layers": 3}}, "expert_config.num_hidden_layers is 3, text_config's 5"),
        ({"use_relative_actions": True}, "use_relative_actions: True is not supported"),
        ({"chunk_size": 0}, "chunk_size: expected an integer of at least 1, got 0"),
        ({"variant": "pi0_fast"}, "variant: 'pi0_fast' is not supported; only 'pi05' or 'pi0' is"),
        ({"variant": "pi0"}, "state_in_prompt: True is not supported; only False is"),
        (OF_PI0 | {"max_state_dim": 6}, "8 values of the state, max_state_dim is 6"),
        (OF_PI0 | {"norm_stats": {"x": {"action": IO["action_stats"]}}}, "the policy takes a state, but norm_stats"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message.replace("(", r"\(")):
        config_of(**change)


def test_an_observation_of_no_use_is_refused_by_name(tmp_path: Path) -> None:
    config = config_of(tokenizer_max_length=40)
    tokenizer_of_words([IO["prompt_with_state_quantile"]], tmp_path)
    np.save(tmp_path / "noise.npy", np.zeros((4, 10, 32), np.float32))
    policy = Pi05Policy(config, tmp_path, None)
    image, state = np.zeros((20, 30, 3), np.uint8), np.zeros(8)
    assert set(policy.inputs(Observation(image, "place it", state))) == {"pixel_values", "input_ids", "noise"}
    for seen, message in (
        (Observation(image, "place it", np.zeros(7)), "state: expected 8 finite values"),
        (Observation(image, "place it", np.full(8, np.nan)), "state: expected 8 finite values"),
        (Observation(image, "place it", None), "state: expected 8 finite values"),
        (Observation(image, " ", state), "instruction is empty"),
        (Observation(image, "it " * 60, state), "the prompt has .* ids, the policy takes 40; shorten it"),
        (Observation(image, "place it", state, (image,)), "images: the policy looks at 1, got 2"),
    ):
        with pytest.raises(DataError, match=message):
            policy.inputs(seen)


def test_a_noise_bank_or_tokenizer_of_another_policy_is_refused(tmp_path: Path) -> None:
    config = config_of()
    tokenizer_of_words(["place it"], tmp_path)
    with pytest.raises(ArtefactError, match=r"noise\.npy: no such file"):
        Pi05Policy(config, tmp_path, None)
    np.save(tmp_path / "noise.npy", np.zeros((2, 9, 32), np.float32))
    with pytest.raises(ArtefactError, match=r"expected float32 \[entries, 10, 32\]"):
        Pi05Policy(config, tmp_path, None)
    np.save(tmp_path / "noise.npy", np.full((2, 10, 32), np.nan, np.float32))
    with pytest.raises(ArtefactError, match="not all of its numbers are finite"):
        Pi05Policy(config, tmp_path, None)
    with pytest.raises(PolicyError, match="the policy has embeddings of 4; it is another policy's tokenizer"):
        FlowPrompt(tmp_path / "tokenizer.json", config_of(vocab_size=4))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(PolicyError, match="must put '<bos>' before a prompt"):
        FlowPrompt(tmp_path / "tokenizer.json", config)
