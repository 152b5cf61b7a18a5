"""A torch policy that answers observations: the reference for engines, and what the simulators drive."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from calibrator.families.decisions import Decisions, decisions_of
from calibrator.families.loading import load_policy
from calibrator.families.model import Inputs, OpenVLA
from vla_policy.core.actions import finite
from vla_policy.core.image import pixel_values
from vla_policy.core.observation import Decision, Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prompt import PromptTokenizer


class TorchActor:
    """Preprocessing, prompt and un-normalisation around a policy; the same core as the robot's."""

    def __init__(self, policy: OpenVLA, tokenizer: PromptTokenizer, decisions: Decisions, unnorm_key: str) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.decisions = decisions
        self.unnorm_key = unnorm_key

    @staticmethod
    def load(folder: Path | str, unnorm_key: str | None = None, dtype: torch.dtype = torch.float32) -> "TorchActor":
        """The actor for the policy in `folder`; see `load_policy` for errors, and `unnorm_key` of PolicyConfig."""
        config = PolicyConfig.load(folder)
        key = config.unnorm_key(unnorm_key)
        tokenizer, decisions = PromptTokenizer(folder, config, key), decisions_of(config, key)
        return TorchActor(load_policy(folder, dtype), tokenizer, decisions, key)

    @property
    def config(self) -> PolicyConfig:
        return self.policy.config

    def act(self, observation: Observation) -> Decision:
        inputs = self._inputs(observation)
        return self.decisions.decision(self.policy.decide(inputs, self.decisions.size)[0].cpu().numpy())

    @torch.no_grad()
    def scores(self, observation: Observation, tokens: np.ndarray) -> np.ndarray:
        """float32 [K, bins]: the action tokens' logits along `tokens` [K]; of a policy without tokens its normalised
        actions [H, K]. Raises EngineError unless they are finite."""
        inputs = self._inputs(observation)
        if self.config.chunk is not None:
            decided = self.policy.decide(inputs, self.decisions.size)
            return decided.cpu().numpy().reshape(self.config.chunk, -1)
        wanted = torch.from_numpy(tokens)[None].to(inputs.input_ids.device)
        logits = self.policy.action_logits(inputs.pixel_values, inputs.input_ids, wanted)[0]
        first = self.config.token_vocab - self.config.n_action_bins
        scores = logits[:, first : self.config.token_vocab].cpu().numpy()
        return finite(scores, "torch policy: logits of the action tokens")

    def _inputs(self, observation: Observation) -> Inputs:
        ids = self.tokenizer.encode(observation.instruction, observation.state)
        return stack_inputs(self.policy, self.unnorm_key, [observation], ids[None])


def stack_inputs(
    policy: OpenVLA, unnorm_key: str, observations: Sequence[Observation], input_ids: np.ndarray
) -> Inputs:
    """Observations with their prompts' ids int64 [B, L], on the policy's device and in its dtype."""
    weight = policy.projector.fc1.weight
    pixels = np.stack([pixel_values(observation.images, policy.config) for observation in observations])
    state = None
    proprio = policy.config.stats(unnorm_key).proprio
    if policy.config.use_proprio and proprio is not None:
        rows = np.stack([proprio.normalised(observation.state) for observation in observations])
        state = torch.from_numpy(rows).to(weight.device, weight.dtype)
    ids = torch.from_numpy(input_ids).to(weight.device)
    return Inputs(torch.from_numpy(pixels).to(weight.device, weight.dtype), ids, state)
