"""The prompt's tokens: OpenVLA's sentence, then the state's bins, then the empty token."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import INSTRUCTIONS, tiny_config
from tokenizers import Tokenizer, processors

from demo.tokenizer import ACTION_BINS, save_tokenizer
from vla_policy.core.errors import ArtefactError, DataError, PolicyError
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prismatic.actions import ActionCodec
from vla_policy.core.prismatic.prompt import LONGEST_PROMPT, PromptTokenizer

STATE = np.array([0.25, 0.05], np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vocab = save_tokenizer(INSTRUCTIONS, tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(vocab)))
    return tmp_path


@pytest.fixture
def raw(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_the_prompt_is_openvlas_sentence(folder: Path, raw: Tokenizer) -> None:
    config = PolicyConfig.load(folder)
    ids = PromptTokenizer(folder, config).encode("Pick up the RED block ", STATE)
    words, state, empty = ids[:-3], ids[-3:-1], ids[-1]
    assert words[0] == raw.token_to_id("<s>")
    assert empty == raw.token_to_id("▁")
    assert raw.decode(words.tolist()) == "In: What action should the robot take to pick up the red block?\nOut:"
    # The state's bins are read back with the action codec's centres: 0.25 of [-1, 1] and the middle of [0, 0.1].
    centres = ActionCodec.of(config).tokens_to_normalised(state)
    np.testing.assert_allclose(centres, [0.25, 0.0], atol=1 / 255)


@pytest.mark.parametrize("text", ["pick\u00a0up\u2003the red block", "\tpick  up\r\nthe\u3000red block\u0085"])
def test_white_space_of_any_kind_is_one_blank(folder: Path, text: str) -> None:
    tokenizer = PromptTokenizer(folder, PolicyConfig.load(folder))
    np.testing.assert_array_equal(tokenizer.encode(text, STATE), tokenizer.encode("pick up the red block", STATE))


def test_the_last_ids_are_the_action_bins_in_openvlas_order(folder: Path, raw: Tokenizer) -> None:
    config = PolicyConfig.load(folder)
    assert raw.get_vocab_size() == config.token_vocab
    assert raw.id_to_token(config.token_vocab - 1) == "<action_1>"
    assert raw.id_to_token(config.token_vocab - ACTION_BINS) == "<action_256>"


def test_any_text_can_be_encoded(folder: Path, raw: Tokenizer) -> None:
    text = "verschiebe den größten Würfel 立方体 😀"
    assert raw.decode(raw.encode(text).ids) == text
    assert raw.token_to_id("<unk>") not in raw.encode(text).ids


def test_the_tokenizer_is_the_same_whatever_the_order_of_the_instructions(tmp_path: Path) -> None:
    save_tokenizer(INSTRUCTIONS, tmp_path / "a.json")
    save_tokenizer(INSTRUCTIONS[::-1], tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_policy_without_state_ignores_it(folder: Path) -> None:
    raw_config = tiny_config(768) | {"state_in_prompt": False}
    tokenizer = PromptTokenizer(folder, PolicyConfig.from_dict(raw_config, "config.json"))
    np.testing.assert_array_equal(tokenizer.encode("open the drawer"), tokenizer.encode("open the drawer", STATE))


def test_a_prompt_longer_than_an_engine_reads_is_refused(folder: Path) -> None:
    tokenizer = PromptTokenizer(folder, PolicyConfig.load(folder))
    lengths = []
    with pytest.raises(DataError, match=r"the prompt has \d+ ids, allowed are 128; shorten it"):
        for words in range(1, LONGEST_PROMPT):
            lengths.append(len(tokenizer.encode("x " * words, STATE)))
    assert LONGEST_PROMPT - 2 <= max(lengths) <= LONGEST_PROMPT


@pytest.mark.parametrize("state", [None, np.zeros(3, np.float32), np.array([0.0, np.inf], np.float32)])
def test_a_bad_state_is_named(folder: Path, state: np.ndarray | None) -> None:
    with pytest.raises(DataError, match=r"state: expected 2 finite values \['x', 'gripper_width'\]"):
        PromptTokenizer(folder, PolicyConfig.load(folder)).encode("open the drawer", state)


def truncate(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(8)


def fill_up(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(length=64)


def bare(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])


def with_end(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, r"tokenizer.json: truncation {.*'max_length': 8.*} is not supported"),
        (fill_up, r"tokenizer.json: padding {.*'length': 64.*} is not supported"),
        (bare, r"must put '<s>' before a prompt and nothing else, it adds \[\]"),
        (with_end, r"must put '<s>' before a prompt and nothing else, it adds \['<s>', '</s>'\]"),
    ],
)
def test_a_tokenizer_that_changes_the_prompt_is_refused(
    folder: Path, raw: Tokenizer, change: Callable[[Tokenizer], None], message: str
) -> None:
    change(raw)
    raw.save(str(folder / "tokenizer.json"))
    with pytest.raises(PolicyError, match=message):
        PromptTokenizer(folder, PolicyConfig.load(folder))


def test_a_missing_or_damaged_tokenizer_is_named(folder: Path) -> None:
    config = PolicyConfig.load(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"tokenizer.json: not a tokenizer file"):
        PromptTokenizer(folder, config)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtefactError, match=r"tokenizer.json: no such file"):
        PromptTokenizer(folder, config)
