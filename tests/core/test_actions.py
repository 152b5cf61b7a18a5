"""Action tokens against the published model's numbers and their own definition."""

import numpy as np
import pytest
from golden import golden_numbers

from vla_policy.core.actions import ActionCodec
from vla_policy.core.errors import DataError, PolicyError
from vla_policy.core.policy_config import PolicyConfig

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


def test_an_action_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="expected 7 finite values"):
        ActionCodec.of(CONFIG).action_to_tokens(np.array([0, 0, 0, 0, 0, 0, np.nan]))


def test_an_unknown_unnorm_key_names_the_choices() -> None:
    with pytest.raises(PolicyError, match="'bridge' is not in the policy's norm_stats; choose one of: golden"):
        ActionCodec.of(CONFIG, "bridge")
