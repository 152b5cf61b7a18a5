"""The prompt as token ids: openpi's sentence with the state's bins, or the bare instruction."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from vla_policy.core.errors import ArtefactError, DataError, PolicyError
from vla_policy.core.flow.config import FlowConfig
from vla_policy.core.instruction import normalised

TOKENIZER = "tokenizer.json"
_BOS = "<bos>"
_PROMPT = "Task: {}, State: {};\nAction: "
_END = "\n"
_BINS = np.linspace(-1, 1, 257)[:-1]


def state_bins(values: np.ndarray) -> np.ndarray:
    """int64, same shape: 0 to 255 on [-1, 1], -1 below; not clipped."""
    return np.digitize(values, _BINS) - 1


class FlowPrompt:
    """Turns an instruction, and the normalised state if it belongs there, into `input_ids`.

    Raises ArtefactError for a file that is missing or damaged, PolicyError for a tokenizer that makes other tokens.
    """

    def __init__(self, path: Path, config: FlowConfig) -> None:
        """path: of the tokenizer's file."""
        if not path.is_file():
            raise ArtefactError(f"{path}: no such file; a policy folder needs its tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception for a damaged file
            raise ArtefactError(f"{path}: not a tokenizer file ({error})") from error
        _check(self._tokenizer, path, config)
        self._config = config

    def encode(self, instruction: str, state: np.ndarray | None) -> np.ndarray:
        """int64 [L], from BOS on. state: normalised, [S]; None where it is not in the prompt.

        Raises DataError for an instruction that is empty, or longer than the policy takes.
        """
        words = normalised(instruction.replace("_", " "))
        if not words:
            raise DataError("instruction is empty; a policy needs a task in words")
        if state is None:
            ids = [*self._tokenizer.encode(words).ids, *self._tokenizer.encode(_END, add_special_tokens=False).ids]
        else:
            if self._config.convention.padded_state:
                state = np.pad(state, (0, self._config.state_width - len(state)))
            ids = self._tokenizer.encode(_PROMPT.format(words, " ".join(map(str, state_bins(state))))).ids
        if len(ids) > self._config.longest_prompt:
            raise DataError(
                f"instruction: the prompt has {len(ids)} ids, the policy takes {self._config.longest_prompt}; shorten "
                "it"
            )
        return np.asarray(ids, np.int64)


    def check(self, instruction: str) -> None:
        """Raises DataError as `encode` does of an instruction, unless it fits beside every state: the number of a bin
        has one to three digits, which may be a token each."""
        for value in (-2.0, 1.0):
            self.encode(instruction, np.full(self._config.state_dim, value) if self._config.state_in_prompt else None)


def _check(tokenizer: Tokenizer, path: Path, config: FlowConfig) -> None:
    """Raises PolicyError unless a prompt becomes BOS and its own tokens, and all tokens have an embedding."""
    for setting in ("truncation", "padding"):
        if (value := getattr(tokenizer, setting)) is not None:
            raise PolicyError(f"{path}: {setting} {value} is not supported, prompts are taken whole; set it to null")
    bos = tokenizer.token_to_id(_BOS)
    ids, words = (tokenizer.encode(_PROMPT, add_special_tokens=special).ids for special in (True, False))
    if bos is None or ids != [bos, *words]:
        raise PolicyError(f"{path}: its post-processor must put {_BOS!r} before a prompt, and nothing else")
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise PolicyError(
            f"{path}: {tokenizer.get_vocab_size()} tokens, the policy has embeddings of {config.vocab_size}; it is "
            "another policy's tokenizer"
        )
