"""OpenVLA-OFT: one pass without a cache decides a chunk of continuous actions, the state as an embedding if taken."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_policy.core.errors import PolicyError
from vla_policy.core.observation import Decision, Observation, finite
from vla_policy.core.policy_config import SPAN_EPSILON, count, flag, normalization_of
from vla_policy.core.prismatic.actions import ChunkCodec
from vla_policy.core.prismatic.config import PrismaticConfig, check_preprocessor
from vla_policy.core.prismatic.describe import describe
from vla_policy.core.prismatic.pixels import pixel_values
from vla_policy.core.prismatic.prompt import TOKENIZER, PromptTokenizer, rows
from vla_policy.core.program import Program

EOS = 2
"""The id that ends every sequence; with attention to both sides it counts."""


@dataclass(frozen=True, kw_only=True)
class OftConfig(PrismaticConfig):
    """An OpenVLA-OFT policy's configuration; its chunk is the `horizon`.

    use_proprio: whether the state is an embedding after the patches.
    """

    use_proprio: bool

    @property
    def behind_prompt(self) -> tuple[int, ...]:
        """The ids behind the prompt's: none for each value that the head is to read, and the end."""
        return *[0] * (self.horizon * self.action_dim), EOS


class OftPolicy:
    """Decides with the calls `vision` and `decide`."""

    scored = "normalised actions"

    def __init__(self, config: OftConfig, folder: Path, unnorm_key: str | None) -> None:
        stats = config.stats(unnorm_key)
        self._config = config
        self._prompt = PromptTokenizer(folder, config, unnorm_key)
        self._proprio = stats.proprio if config.use_proprio else None
        self._codec = ChunkCodec(stats.action, config.horizon)

    def check_instruction(self, instruction: str) -> None:
        self._prompt.check(instruction)

    def inputs(self, observation: Observation) -> dict[str, np.ndarray]:
        """`pixel_values` [1, 6 N, S, S], `input_ids` [1, L] and, where it is taken, `state` [1, S], normalised."""
        inputs = {
            "pixel_values": pixel_values(observation.images, self._config)[None],
            "input_ids": self._prompt.encode(observation.instruction, observation.state)[None],
        }
        if self._proprio is not None:
            inputs["state"] = self._proprio.normalised(observation.state)[None]
        return inputs

    def decide(self, program: Program, inputs: Mapping[str, np.ndarray]) -> Decision:
        """Actions [H, K]; there are no tokens."""
        return Decision(np.zeros(0, np.int64), self._codec.to_actions(self._normalised(program, inputs)))

    def scores(self, program: Program, inputs: Mapping[str, np.ndarray], decided: Decision) -> np.ndarray:
        """float32 [H, K]: the normalised actions; one pass decides them all, so `decided` changes nothing."""
        return finite(self._normalised(program, inputs), self.scored)

    def _normalised(self, program: Program, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        _, patches = program.run("vision", {"pixel_values": inputs["pixel_values"]})
        config = self._config
        ids = rows(inputs["input_ids"], config.num_patches + config.use_proprio, config.behind_prompt)
        state = {"state": inputs["state"]} if config.use_proprio else {}
        values, _ = program.run("decide", {"rows": ids, **state, **patches})
        return values["actions"][0]


class OpenVlaOft:
    """The family."""

    files = (TOKENIZER,)

    def config(self, raw: dict[str, Any], source: str) -> OftConfig:
        chunk = count(raw, "num_actions_chunk", source)
        if chunk is None:
            raise PolicyError(f"{source}: num_actions_chunk is missing; import the OpenVLA-OFT checkpoint again")
        use_proprio = flag(raw, "use_proprio", source)
        stated = normalization_of(raw, None, source)
        config = OftConfig.parsed(raw, source, stated, chunk, takes_state=use_proprio, use_proprio=use_proprio)
        if len({stats.action.dim for stats in config.norm_stats.values()}) > 1:
            raise PolicyError(
                f"{source}: norm_stats: an action head gives actions of one length, the statistics differ"
            )
        return config

    def check_folder(self, config: OftConfig, folder: Path) -> None:
        check_preprocessor(config, folder)

    def policy(self, config: OftConfig, folder: Path, unnorm_key: str | None) -> OftPolicy:
        return OftPolicy(config, folder, unnorm_key)

    def description(self, config: OftConfig) -> dict[str, Any]:
        state = {"state_embedded": config.use_proprio}  # clip(2 (x - low) / (high - low + 1e-8) - 1, -1, 1) where mask
        form = {
            "chunk": config.horizon,
            "un_normalise": f"0.5 (x + 1)(high - low + {SPAN_EPSILON:g}) + low where mask, x elsewhere",
        }
        return describe(config, state, form)


FAMILY = OpenVlaOft()
