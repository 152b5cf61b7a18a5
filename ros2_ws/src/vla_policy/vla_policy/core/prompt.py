"""The prompt as token ids: OpenVLA's sentence, the state's bins where the policy takes one, and the empty token."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from vla_policy.core.actions import value_to_tokens
from vla_policy.core.errors import ArtefactError, DataError, PolicyError
from vla_policy.core.policy_config import PolicyConfig

# Training ended the prompt with this token (29871 in Llama-2's vocabulary); without it the actions degrade.
_EMPTY = "▁"


class PromptTokenizer:
    """Turns an instruction, and the state if the policy takes one, into `input_ids`."""

    def __init__(self, folder: Path | str, config: PolicyConfig, unnorm_key: str | None = None) -> None:
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ArtefactError(f"{path}: no such file; a policy folder needs its tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception for a damaged file
            raise ArtefactError(f"{path}: not a tokenizer file ({error})") from error
        empty = self._tokenizer.token_to_id(_EMPTY)
        if empty is None:
            raise PolicyError(f"{path}: the vocabulary has no {_EMPTY!r} token, with which OpenVLA prompts end")
        self._empty_id = int(empty)
        self._config = config
        self._proprio = config.stats(unnorm_key).proprio
        if config.state_in_prompt and self._proprio is None:
            raise PolicyError("config.json: state_in_prompt is set but norm_stats has no named proprio statistics")

    def encode(self, instruction: str, state: np.ndarray | None = None) -> np.ndarray:
        """int64 [L]: BOS, the sentence, the state's bin tokens, the empty token.

        The patch embeddings belong right after BOS. Raises DataError for an empty instruction or a state that is
        missing, of another length or not finite.
        """
        words = instruction.strip().lower()
        if not words:
            raise DataError("instruction is empty; a policy needs a task in words")
        ids = self._tokenizer.encode(f"In: What action should the robot take to {words}?\nOut:").ids
        ids = [*ids, *self._state_tokens(state)]
        if ids[-1] != self._empty_id:
            ids.append(self._empty_id)
        return np.asarray(ids, np.int64)

    def _state_tokens(self, state: np.ndarray | None) -> list[int]:
        if not self._config.state_in_prompt or self._proprio is None:
            return []
        q01, q99 = np.asarray(self._proprio.q01), np.asarray(self._proprio.q99)
        values = 2 * (self._proprio.checked(state) - q01) / (q99 - q01) - 1
        return value_to_tokens(values, self._config.token_vocab, self._config.n_action_bins).tolist()
