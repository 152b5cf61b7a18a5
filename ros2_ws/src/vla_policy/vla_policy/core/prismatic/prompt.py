"""The prompt as token ids: OpenVLA's sentence, the state's bins where the policy takes one, and the empty token."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from vla_policy.core.errors import ArtefactError, DataError, PolicyError
from vla_policy.core.instruction import normalised
from vla_policy.core.prismatic.actions import value_to_tokens
from vla_policy.core.prismatic.config import PrismaticConfig

# Training ended the prompt with this token (29871 in Llama-2's vocabulary); without it the actions degrade.
_EMPTY = "▁"
_BOS = "<s>"
_PROMPT = "In: What action should the robot take to {}?\nOut:"

TOKENIZER = "tokenizer.json"
TYPICAL_PROMPT, LONGEST_PROMPT = 30, 128
"""Prompts in ids. With the patches and the action tokens the longest bounds what an engine's key/value cache holds."""


class PromptTokenizer:
    """Turns an instruction, and the state if the policy takes one, into `input_ids`.

    Raises ArtefactError for a file that is missing or damaged, PolicyError for a tokenizer that makes other tokens.
    """

    def __init__(self, folder: Path | str, config: PrismaticConfig, unnorm_key: str | None = None) -> None:
        path = Path(folder) / TOKENIZER
        if not path.is_file():
            raise ArtefactError(f"{path}: no such file; a policy folder needs its tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception for a damaged file
            raise ArtefactError(f"{path}: not a tokenizer file ({error})") from error
        self._empty_id = _id(self._tokenizer, _EMPTY, path)
        _check(self._tokenizer, path)
        self._config = config
        self._proprio = config.stats(unnorm_key).proprio if config.state_in_prompt else None

    def encode(self, instruction: str, state: np.ndarray | None = None) -> np.ndarray:
        """int64 [L]: BOS, the sentence, the state's bin tokens, the empty token.

        The patch embeddings belong right after BOS. Raises DataError for an instruction that is empty or too long, or a
        state that is missing, of another length or not finite.
        """
        return np.asarray(self._ids(instruction, self._state_tokens(state)), np.int64)

    def check(self, instruction: str) -> None:
        """Raises DataError as `encode` does of an instruction; a state has as many tokens whatever it is."""
        self._ids(instruction, [] if self._proprio is None else [self._empty_id] * len(self._proprio.names))

    def _ids(self, instruction: str, state: list[int]) -> list[int]:
        words = normalised(instruction).lower()
        if not words:
            raise DataError("instruction is empty; a policy needs a task in words")
        ids: list[int] = [*self._tokenizer.encode(_PROMPT.format(words)).ids, *state]
        if ids[-1] != self._empty_id:
            ids.append(self._empty_id)
        if len(ids) > LONGEST_PROMPT:
            raise DataError(f"instruction: the prompt has {len(ids)} ids, allowed are {LONGEST_PROMPT}; shorten it")
        return ids

    def _state_tokens(self, state: np.ndarray | None) -> list[int]:
        if self._proprio is None:
            return []
        values = self._proprio.normalised(state, epsilon=0.0)
        return value_to_tokens(values, self._config.token_vocab, self._config.n_action_bins).tolist()


def rows(ids: np.ndarray, patches: int, behind: Sequence[int] = ()) -> np.ndarray:
    """int64 [1, rows], of every row of the sequence its id: those of a prompt [1, L], `patches` behind its first, and
    those `behind` it. Zero where the row is no word."""
    return np.concatenate([ids[0, :1], np.zeros(patches, np.int64), ids[0, 1:], np.asarray(behind, np.int64)])[None]


def _id(tokenizer: Tokenizer, token: str, path: Path) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise PolicyError(f"{path}: the vocabulary has no {token!r} token, which OpenVLA's prompts have")
    return found


def _check(tokenizer: Tokenizer, path: Path) -> None:
    """Raises PolicyError unless a prompt becomes BOS and its own tokens, every one of them and nothing else."""
    for setting in ("truncation", "padding"):
        if (value := getattr(tokenizer, setting)) is not None:
            raise PolicyError(f"{path}: {setting} {value} is not supported, prompts are taken whole; set it to null")
    ids, words = (tokenizer.encode(_PROMPT, add_special_tokens=special).ids for special in (True, False))
    if ids != [_id(tokenizer, _BOS, path), *words]:
        added = [tokenizer.id_to_token(token) for token in ids if token not in words]
        raise PolicyError(
            f"{path}: the post-processor must put {_BOS!r} before a prompt and nothing else, it adds {added}"
        )
