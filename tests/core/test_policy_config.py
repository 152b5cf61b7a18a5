"""What a checkpoint says is read as its own loader reads it; what it does not say, or says otherwise, is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import golden_numbers
from tiny import tiny_config

from vla_policy.core.errors import PolicyError
from vla_policy.core.files import sha256_policy
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prismatic.actions import ActionCodec, ChunkCodec

PUBLISHED: dict[str, Any] = golden_numbers()["config"]
# As OpenVLA-7B's, with what later versions of transformers write into text_config.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
PREPROCESSOR = {
    "image_processor_type": "PrismaticImageProcessor",
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 224, 224], [3, 224, 224]],
    "interpolations": ["bicubic", "bicubic"],
    "means": [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]],
    "stds": [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]],
    "tvf_do_letterbox": False,
    "tvf_letterbox_fill": None,
    "use_fused_vision_backbone": True,
}


def published(**changes: Any) -> dict[str, Any]:
    """The published configuration with other values; `text_config` is updated, not replaced."""
    raw = copy.deepcopy(PUBLISHED)
    raw["text_config"] |= changes.pop("text_config", {})
    return raw | changes


def parse(raw: dict[str, Any]) -> PolicyConfig:
    return PolicyConfig.from_dict(raw, "config.json")


def test_the_published_configuration_is_read_whatever_else_it_tells() -> None:
    other = {"transformers_version": "4.40.1", "torch_dtype": "bfloat16", "_name_or_path": "x", "note": {"a": "word"}}
    described = published(text_config=LLAMA, **other)
    plain, told = parse(published()), parse(described)
    assert told.text == plain.text and told.text.rope_theta == 10000.0
    assert (told.towers, told.normalization, told.horizon) == (plain.towers, "bounds_q99", 1)


def test_the_base_of_the_positions_is_read_where_it_is_written() -> None:
    for text in ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}):
        assert parse(published(text_config=text)).text.rope_theta == 5e5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("arch_specifier", "no-align+gelu-mlp"),
        ("image_resize_strategy", "letterbox"),
        ("image_sizes", [384, 384]),
        ("llm_backbone_id", "vicuna-v15-7b"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("tie_word_embeddings", True),
        ("timm_override_act_layers", [None, "quick_gelu"]),
        ("use_film", True),
        ("use_fused_vision_backbone", False),
        ("text_config.attention_bias", True),
        ("text_config.head_dim", 128),
        ("text_config.hidden_act", "gelu"),
        ("text_config.mlp_bias", True),
        ("text_config.model_type", "qwen2"),
        ("text_config.partial_rotary_factor", 0.5),
        ("text_config.quantization_config", {"load_in_4bit": True}),
        ("text_config.rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("text_config.rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("text_config.rope_scaling", {"type": "linear", "factor": 4.0}),
        ("text_config.sliding_window", 512),
        ("text_config.tie_word_embeddings", True),
    ],
)
def test_a_value_that_changes_the_arithmetic_is_refused_by_name(key: str, value: Any) -> None:
    name = key.removeprefix("text_config.")
    changes = {name: value} if name == key else {"text_config": {name: value}}
    with pytest.raises(PolicyError) as refused:
        parse(published(**changes))
    assert str(refused.value).startswith(f"config.json: {key}: {value!r} is not supported")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (published(model_type="pi0"), "model_type is 'pi0', expected one of: openvla, openvla_oft"),
        (published(model_type=["openvla"]), r"model_type is \['openvla'\], expected one of"),
        (published(num_actions_chunk=8), "num_actions_chunk belongs to model_type 'openvla_oft', .* again"),
        (published(use_proprio=True), "use_proprio belongs to model_type 'openvla_oft', this is 'openvla'; import"),
        (published(model_type="openvla_oft"), "num_actions_chunk is missing; import the OpenVLA-OFT checkpoint again"),
    ],
)
def test_a_configuration_belongs_to_one_known_family(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=f"config.json: {message}"):
        parse(raw)


def tower(**changes: Any) -> list[dict[str, Any]]:
    first, second = tiny_config(768)["vision_towers"]
    return [first | changes, second]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"hidden_size": 256.0}}, "hidden_size: expected an integer of at least 1, got 256.0"),
        ({"text_config": {"num_attention_heads": 0}}, "num_attention_heads: expected an integer of at least"),
        ({"text_config": {"rms_norm_eps": 0}}, "text_config: rms_norm_eps: expected a number above 0, got 0"),
        ({"text_config": {"rope_theta": "1e4"}}, "text_config: rope_theta: expected a number above 0, got '1e4'"),
        ({"text_config": {"vocab_size": 320}}, "vocab_size: 320 has no room for 256 action tokens before 64 rows of"),
        ({"n_action_bins": 1}, "n_action_bins: expected an integer of at least 2, got 1"),
        ({"steps_per_action": 1.5}, "steps_per_action: expected an integer of at least 1, got 1.5"),
        ({"num_images_in_input": True}, "num_images_in_input: expected an integer of at least 1, got True"),
        ({"state_in_prompt": "false"}, "state_in_prompt: expected true or false, got 'false'"),
        ({"vision_towers": tower(patch_size=0)}, r"vision_towers\[0\]: patch_size: expected an integer of at least 1"),
        ({"vision_towers": tower(patch_size=12)}, "patches must fill the image and heads the width"),
        ({"vision_towers": tower(depth=1)}, "depth: expected an integer of at least 2, got 1"),
    ],
)
def test_sizes_and_switches_are_what_they_claim_to_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse(published(**changes))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(PolicyError, match="hidden_size 256, num_attention_heads 3 and num_key_value_heads 3 do not"):
        parse(published(text_config={"num_attention_heads": 3, "num_key_value_heads": 3}))


# --- statistics ------------------------------------------------------------------------------------------------------

Q99 = {"q01": [-0.4, -0.2], "q99": [0.4, 0.2]}
BOUNDS = {"min": [-1.6, -2.0], "max": [1.6, 0.0]}


def with_statistics(action: dict[str, Any], proprio: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """An OpenVLA-OFT policy of two action and two state values."""
    statistics = {"action": action, "proprio": {"names": ["a", "b"]} | proprio}
    return tiny_config(768, chunk=2) | {"norm_stats": {"tiny": statistics}} | changes


@pytest.mark.parametrize(("choice", "low", "high"), [("bounds", "min", "max"), ("bounds_q99", "q01", "q99")])
def test_actions_and_state_are_normalised_by_what_was_stated(choice: str, low: str, high: str) -> None:
    both = Q99 | BOUNDS
    config = parse(with_statistics(both, both, action_proprio_normalization_type=choice))
    stats = config.stats(None)
    assert stats.proprio is not None
    span = np.subtract(both[high], both[low]) + 1e-8
    values = np.array([[0.5, -0.25], [1.0, -1.0]])
    expected = 0.5 * (values + 1) * span + both[low]
    np.testing.assert_allclose(ChunkCodec(stats.action, 2).to_actions(values.ravel()), expected, rtol=1e-12)
    state = np.array([0.1, -0.15])
    scaled = 2 * (state - both[low]) / span - 1
    np.testing.assert_allclose(stats.proprio.normalised(state), scaled, rtol=1e-12)
    np.testing.assert_array_equal(stats.proprio.normalised(np.array([99.0, -99.0])), [1, -1])


def test_a_token_policy_may_state_it_too() -> None:
    raw = tiny_config(768)
    action = {"min": [-4.0, -2.0, 0.0], "max": [4.0, 2.0, 1.0]}
    raw["norm_stats"]["tiny"]["action"] = action
    raw["norm_stats"]["tiny"]["proprio"] |= {"min": [-1.0, 0.0], "max": [1.0, 0.1]}
    codec = ActionCodec.of(parse(raw | {"action_proprio_normalization_type": "bounds"}))
    # The centre of the last of 255 bins lies half a bin below the maximum.
    most = np.subtract(action["max"], np.subtract(action["max"], action["min"]) / 255 / 2)
    np.testing.assert_allclose(codec.tokens_to_action(np.full(3, codec.first_token)), most, rtol=1e-12)
    with pytest.raises(PolicyError, match=r"tiny.action: 'q01' is missing, which 'bounds_q99' normalises by"):
        parse(raw)


def test_state_values_that_are_masked_stay_as_they_are() -> None:
    stats = parse(with_statistics(Q99, Q99 | {"mask": [True, False]})).stats(None).proprio
    assert stats is not None
    np.testing.assert_allclose(stats.normalised(np.array([0.2, 0.3])), [0.5, 0.3], rtol=1e-7)


def test_a_chunk_policy_must_state_it() -> None:
    raw = with_statistics(Q99, Q99)
    del raw["action_proprio_normalization_type"]
    with pytest.raises(PolicyError, match=r"action_proprio_normalization_type: expected 'bounds' .* got None"):
        parse(raw)
    with pytest.raises(PolicyError, match="got 'normal'"):
        parse(raw | {"action_proprio_normalization_type": "normal"})


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({}, "norm_stats is empty"),
        (None, "norm_stats: expected a JSON object, got NoneType"),
        ({"tiny": {"action": {"min": [0.0], "max": [1.0]}}}, "tiny.action: 'q01' is missing.*it has max, min"),
        ({"tiny": {"proprio": Q99}}, "key 'action' is missing"),
        ({"tiny": {"action": {"q01": [0.0], "q99": [1.0, 2.0]}}}, "tiny.action: q01, q99 and mask have different"),
        ({"tiny": {"action": {"q01": [0.0], "q99": [float("nan")]}}}, r"tiny.action.q99: \[nan\] are not all finite"),
        ({"tiny": {"action": {"q01": [2.0], "q99": [1.0]}}}, r"q01 \[2.0\] is above q99 \[1.0\]"),
        ({"tiny": {"action": {"q01": 0.0, "q99": 1.0}}}, "tiny.action.q01: expected a list of numbers, got 0.0"),
        ({"tiny": {"action": Q99 | {"mask": ["true", "false"]}}}, "mask: expected a list of true and false"),
        ({"tiny": {"action": Q99}}, "takes a state, but norm_stats.tiny has no named proprio"),
        ({"tiny": {"action": Q99, "proprio": Q99 | {"names": ["a"]}}}, "tiny.proprio: 1 names for 2 values"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(statistics: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse(with_statistics(Q99, Q99, norm_stats=statistics))


def two_sizes(raw: dict[str, Any]) -> None:
    proprio = raw["norm_stats"]["tiny"]["proprio"]
    raw["norm_stats"]["other"] = {"action": {"q01": [0.0], "q99": [1.0]}, "proprio": proprio}


def two_states(raw: dict[str, Any]) -> None:
    proprio = {"names": ["a"], "q01": [0.0], "q99": [1.0]}
    raw["norm_stats"]["other"] = {"action": raw["norm_stats"]["tiny"]["action"], "proprio": proprio}


@pytest.mark.parametrize(
    ("change", "message"),
    [(two_sizes, "an action head gives actions of one length"), (two_states, r"states of \[1, 2\] values")],
)
def test_all_statistics_must_fit_the_same_weights(change: Callable[[dict[str, Any]], None], message: str) -> None:
    raw = with_statistics(Q99, Q99)
    change(raw)
    with pytest.raises(PolicyError, match=message):
        parse(raw)


def test_a_state_that_never_varied_has_no_bins() -> None:
    raw = tiny_config(768)
    raw["norm_stats"]["tiny"]["proprio"]["q99"] = [1.0, 0.0]
    with pytest.raises(PolicyError, match="low and high must differ where a state has bins"):
        parse(raw)


def test_statistics_of_fine_tuning_replace_those_of_the_base(tmp_path: Path) -> None:
    """OpenVLA's loader does so; the policy is then another one, by its hash too."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    before = sha256_policy(tmp_path)
    assert list(PolicyConfig.load(tmp_path).norm_stats) == ["golden"]
    tuned = {"libero_spatial": PUBLISHED["norm_stats"]["golden"]}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(tuned))
    config = PolicyConfig.load(tmp_path)
    assert list(config.norm_stats) == ["libero_spatial"] == list(config.raw["norm_stats"])
    assert sha256_policy(tmp_path) != before


def test_the_checkpoints_own_preprocessor_must_be_the_one_that_is_implemented(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    assert PolicyConfig.load(tmp_path).image_size == 224
    for key, value in (("interpolations", ["bilinear", "bicubic"]), ("tvf_do_letterbox", True)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | {key: value}))
        with pytest.raises(PolicyError, match=f"preprocessor_config.json: {key}: .* is not supported"):
            PolicyConfig.load(tmp_path)
