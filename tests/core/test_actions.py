"""Action tokens against the published model's numbers and their own definition."""

import numpy as np
import pytest
from golden import golden_numbers

from vla_policy.core.errors import DataError, EngineError, PolicyError
from vla_policy.core.observation import Decision
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prismatic.actions import ActionCodec, ChunkCodec

GOLDEN = golden_numbers()
CONFIG = PolicyConfig.from_dict(GOLDEN["config"], "config.json")


def test_tokens_become_the_published_action() -> None:
    action = ActionCodec.of(CONFIG).tokens_to_action(np.array(GOLDEN["action_tokens_restricted_greedy"]))
    np.testing.assert_allclose(action, GOLDEN["action"], rtol=1e-12)


def test_every_bin_survives_the_round_trip() -> None:
    codec = ActionCodec.of(CONFIG, "golden")
    assert (codec.first_token, codec.last_token, codec.dim) == (31744, 31999, 7)
    for token in range(codec.first_token + 1, codec.last_token + 1):  # the first id shares the last bin's centre
        tokens = np.full(7, token)
        np.testing.assert_array_equal(codec.action_to_tokens(codec.tokens_to_action(tokens)), tokens)


def test_ids_outside_the_action_range_fall_into_the_nearest_bin() -> None:
    codec = ActionCodec.of(CONFIG)
    assert codec.tokens_to_normalised(np.array([5])) == codec.tokens_to_normalised(np.array([codec.first_token]))


def test_actions_beyond_the_statistics_fall_into_the_outermost_bins() -> None:
    """As training data do in part: a percentile is no bound. The gripper is not normalised."""
    codec = ActionCodec.of(CONFIG, "golden")
    assert codec.action_to_tokens(np.full(7, -1e3)).tolist() == [codec.last_token] * 7
    assert codec.action_to_tokens(np.full(7, 1e3)).tolist() == [codec.first_token] * 7


def test_an_action_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="expected 7 finite values"):
        ActionCodec.of(CONFIG).action_to_tokens(np.array([0, 0, 0, 0, 0, 0, np.nan]))


def test_an_unknown_unnorm_key_names_the_choices() -> None:
    with pytest.raises(PolicyError, match="'bridge' is not in the policy's norm_stats; choose one of: golden"):
        ActionCodec.of(CONFIG, "bridge")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_is_no_decision(value: float) -> None:
    codec = ActionCodec.of(CONFIG)
    logits = np.zeros(256, np.float32)
    logits[31900 - 31744], logits[255] = 1.0, 0.5
    assert codec.choose(logits) == 31900
    logits[0] = value
    with pytest.raises(EngineError, match="logits of the action tokens: 1 of 256 values are not finite"):
        codec.choose(logits)
    chunk = np.zeros((2, 7))
    chunk[1, 3] = value
    with pytest.raises(EngineError, match="normalised actions: 1 of 14 values are not finite"):
        ChunkCodec(CONFIG.stats(None).action, 2).to_actions(chunk)
    with pytest.raises(EngineError, match="action: 1 of 14 values are not finite"):
        Decision(np.zeros(0, np.int64), chunk)
