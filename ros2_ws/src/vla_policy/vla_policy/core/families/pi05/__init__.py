"""pi0.5, and pi0: a prefix of images and prompt is read once, an expert denoises a chunk of actions in N steps.

`variant` in config.json tells which of the two, "pi05" where it is left out.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vla_policy.core.errors import PolicyError
from vla_policy.core.flow.config import FlowConfig
from vla_policy.core.flow.images import pixel_values
from vla_policy.core.flow.noise import NOISE, entry_of, load_bank
from vla_policy.core.flow.prompt import TOKENIZER, FlowPrompt
from vla_policy.core.flow.statistics import Scaling, normalised_state, state_row
from vla_policy.core.observation import Decision, Observation, finite
from vla_policy.core.policy_config import refuse_unless
from vla_policy.core.program import Program

STATE = "state"
"""The input that holds pi0's state."""
_LONGEST_PROMPT = {"pi05": 200, "pi0": 48}


class Pi05Policy:
    """Decides with the calls `vision`, `prefix` and, N times, `step`."""

    scored = "normalised actions"

    def __init__(self, config: FlowConfig, folder: Path, unnorm_key: str | None) -> None:
        stats = config.stats(unnorm_key)
        self._config = config
        self._prompt = FlowPrompt(folder / TOKENIZER, config)
        self._bank = load_bank(folder, config)
        self._proprio = stats.proprio if config.takes_state else None
        if self._proprio is not None:
            self._state = scaling_of(self._proprio, config)
        self._action = scaling_of(stats.action, config)

    def check_instruction(self, instruction: str) -> None:
        self._prompt.check(instruction)

    def inputs(self, observation: Observation) -> dict[str, np.ndarray]:
        """`pixel_values` [1, 3 N, S, S], `input_ids` [1, L], `noise` [1, H, A] and, of pi0, `STATE` [1, 1, S]."""
        config, state = self._config, None
        if self._proprio is not None:
            state = normalised_state(observation.state, self._proprio, self._state)
        inputs = {
            "pixel_values": pixel_values(observation.images, config)[None],
            "input_ids": self._prompt.encode(observation.instruction, state if config.state_in_prompt else None)[None],
            "noise": self._bank[entry_of(observation, len(self._bank))][None],
        }
        if state is not None and not config.state_in_prompt:
            inputs[STATE] = state_row(state, config.state_width)
        return inputs

    def decide(self, program: Program, inputs: Mapping[str, np.ndarray]) -> Decision:
        """Actions [H, K]; there are no tokens."""
        return Decision(np.zeros(0, np.int64), self._action.restored(self._normalised(program, inputs)))

    def scores(self, program: Program, inputs: Mapping[str, np.ndarray], decided: Decision) -> np.ndarray:
        """float32 [H, K]: the normalised actions; nothing was decided before them."""
        return self._normalised(program, inputs)

    def _normalised(self, program: Program, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        _, patches = program.run("vision", {"pixel_values": inputs["pixel_values"]})
        _, cache = program.run("prefix", {"input_ids": inputs["input_ids"], **patches})
        actions: np.ndarray = np.asarray(inputs["noise"], np.float32)
        change = np.float32(-1.0 / self._config.num_inference_steps)
        state = {} if self._config.adaptive else {STATE: inputs[STATE]}
        for step in range(self._config.num_inference_steps):
            number = {"step": np.asarray([step], np.int64)}
            values, _ = program.run("step", {"actions": actions, **number, **state, **cache})
            actions = actions + change * values["velocity"]
        return finite(actions[0, :, : self._config.action_dim], self.scored)


def scaling_of(stats: Any, config: FlowConfig) -> Scaling:
    """How a state or an action is normalised. stats: ProprioStats or ActionStats."""
    return Scaling.of(stats.low, stats.high, config.normalization, config.convention)


_STATE_WAYS = {
    (True, False): "none",
    (True, True): "normalised, in the prompt",
    (False, True): "normalised, a row before the actions",
}


class Pi05:
    """The family."""

    files = (TOKENIZER, NOISE)

    def config(self, raw: dict[str, Any], source: str) -> FlowConfig:
        variant = raw.get("variant", "pi05")
        refuse_unless(variant in _LONGEST_PROMPT, f"{source}: variant", variant, tuple(_LONGEST_PROMPT))
        return FlowConfig.parsed(raw, source, adaptive=variant == "pi05", longest_prompt=_LONGEST_PROMPT[variant])

    def check_folder(self, config: FlowConfig, folder: Path) -> None:
        """Raises PolicyError where the statistics lie in files of their own: they were not imported."""
        stray = [name for name in ("norm_stats.json", "policy_preprocessor.json") if (folder / name).is_file()]
        if stray:
            path = folder / stray[0]
            raise PolicyError(f"{path}: not read here; `calibrator import-pi05` makes a policy folder of a checkpoint")

    def policy(self, config: FlowConfig, folder: Path, unnorm_key: str | None) -> Pi05Policy:
        return Pi05Policy(config, folder, unnorm_key)

    def description(self, config: FlowConfig) -> dict[str, Any]:
        ways = asdict(config.convention)
        with_state = "Task: {instruction}, State: {bins of 256};\\nAction: "
        prompt = with_state if config.state_in_prompt else "{instruction}\\n"
        return {
            "preprocessing": {
                "image": "uint8 RGB, any size, upright",
                "resize": f"bilinear into {config.image_size} x {config.image_size} pixels, aspect ratio kept",
                "scale": "divided by 255, then 2 x - 1",
                "prompt": prompt,
                "state": _STATE_WAYS[config.adaptive, config.takes_state],
                "convention": ways,
            },
            "actions": {
                key: {
                    "chunk": config.horizon,
                    "executed": config.executed,
                    "denoising_steps": config.num_inference_steps,
                    "dimensions": stats.action.dim,
                    "normalization": config.normalization,
                    "steps_per_action": config.steps_per_action,
                    "action": asdict(stats.action),
                    "proprio": asdict(stats.proprio) if stats.proprio else None,
                }
                for key, stats in config.norm_stats.items()
            },
        }


FAMILY = Pi05()
