"""OpenVLA: action tokens one after the other, each with its own pass over the decoder and its key/value cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_policy.core.errors import PolicyError
from vla_policy.core.observation import Decision, Observation, finite
from vla_policy.core.policy_config import normalization_of
from vla_policy.core.prismatic.actions import LOGITS, ActionCodec
from vla_policy.core.prismatic.config import PrismaticConfig, check_preprocessor
from vla_policy.core.prismatic.describe import describe
from vla_policy.core.prismatic.pixels import pixel_values
from vla_policy.core.prismatic.prompt import TOKENIZER, PromptTokenizer, rows
from vla_policy.core.program import Program

_OFT_KEYS = ("num_actions_chunk", "use_proprio")


class _Decoding:
    """The passes of one decision. logits: float32 [bins], of the action tokens that may follow all that was read."""

    def __init__(self, program: Program, inputs: Mapping[str, np.ndarray], patches: int) -> None:
        self._program = program
        _, kept = program.run("vision", {"pixel_values": inputs["pixel_values"]})
        self._read("prefill", {"rows": rows(inputs["input_ids"], patches), **kept})

    def append(self, token: int) -> None:
        """Reads one more token."""
        self._read("step", {"rows": np.asarray([[token]], np.int64), **self._cache})

    def _read(self, call: str, feeds: Mapping[str, Any]) -> None:
        values, self._cache = self._program.run(call, feeds)
        self.logits: np.ndarray = values["logits"][0]


class OpenVlaPolicy:
    """Decides with the calls `vision`, `prefill` and, for each token after the first, `step`."""

    scored = "logits"

    def __init__(self, config: PrismaticConfig, folder: Path, unnorm_key: str | None) -> None:
        self._config = config
        self._prompt = PromptTokenizer(folder, config, unnorm_key)
        self.codec = ActionCodec.of(config, unnorm_key)

    def check_instruction(self, instruction: str) -> None:
        self._prompt.check(instruction)

    def inputs(self, observation: Observation) -> dict[str, np.ndarray]:
        """`pixel_values` [1, 6 N, S, S] and `input_ids` [1, L]."""
        return {
            "pixel_values": pixel_values(observation.images, self._config)[None],
            "input_ids": self._prompt.encode(observation.instruction, observation.state)[None],
        }

    def decide(self, program: Program, inputs: Mapping[str, np.ndarray]) -> Decision:
        """Among the action tokens: no trained policy chooses others, and the engine's head has no other rows."""
        decoding = _Decoding(program, inputs, self._config.num_patches)
        tokens = [self.codec.choose(decoding.logits)]
        while len(tokens) < self.codec.dim:
            decoding.append(tokens[-1])
            tokens.append(self.codec.choose(decoding.logits))
        chosen = np.asarray(tokens, np.int64)
        return Decision(chosen, self.codec.tokens_to_action(chosen))

    def scores(self, program: Program, inputs: Mapping[str, np.ndarray], decided: Decision) -> np.ndarray:
        """float32 [K, bins]: the action tokens' logits along the K tokens that were decided."""
        decoding = _Decoding(program, inputs, self._config.num_patches)
        logits = [decoding.logits]
        for token in decided.tokens[:-1]:
            decoding.append(int(token))
            logits.append(decoding.logits)
        return finite(np.stack(logits), LOGITS)


class OpenVla:
    """The family."""

    files = (TOKENIZER,)

    def config(self, raw: dict[str, Any], source: str) -> PrismaticConfig:
        """See the protocol. An OpenVLA-OFT policy under this name is refused: it would be half understood."""
        for key in _OFT_KEYS:
            if raw.get(key):
                raise PolicyError(
                    f"{source}: {key} belongs to model_type 'openvla_oft', this is 'openvla'; import the OpenVLA-OFT "
                    "checkpoint again"
                )
        return PrismaticConfig.parsed(raw, source, normalization_of(raw, "bounds_q99", source))

    def check_folder(self, config: PrismaticConfig, folder: Path) -> None:
        check_preprocessor(config, folder)

    def policy(self, config: PrismaticConfig, folder: Path, unnorm_key: str | None) -> OpenVlaPolicy:
        return OpenVlaPolicy(config, folder, unnorm_key)

    def description(self, config: PrismaticConfig) -> dict[str, Any]:
        tokens = {
            "bins": config.n_action_bins,
            "first_token": config.action_tokens.start,
            "last_token": config.action_tokens.stop - 1,
            "un_normalise": "0.5 (x + 1)(high - low) + low where mask, x elsewhere",
        }
        return describe(config, {}, tokens)


FAMILY = OpenVla()
