"""A torch policy that answers observations: the reference for engines, and what the simulators drive."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from calibrator.policy.decisions import Decisions, decisions_of
from calibrator.policy.loading import load_policy
from calibrator.policy.model import Inputs, OpenVLA
from calibrator.policy.oft import normalised_state
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
        """The actor for the policy in `folder`; see `load_policy` for errors."""
        policy = load_policy(folder, dtype)
        key = policy.config.unnorm_key(unnorm_key)
        return TorchActor(
            policy, PromptTokenizer(folder, policy.config, key), decisions_of(policy.config, key), key
        )

    @property
    def config(self) -> PolicyConfig:
        return self.policy.config

    def act(self, observation: Observation) -> Decision:
        ids = self.tokenizer.encode(observation.instruction, observation.state)
        inputs = stack_inputs(self.policy, self.unnorm_key, [observation], ids[None])
        return self.decisions.decision(self.policy.decide(inputs, self.decisions.size)[0].cpu().numpy())


def stack_inputs(
    policy: OpenVLA, unnorm_key: str, observations: Sequence[Observation], input_ids: np.ndarray
) -> Inputs:
    """Observations with their prompts' ids int64 [B, L], on the policy's device and in its dtype."""
    weight = policy.projector.fc1.weight
    pixels = np.stack([pixel_values(observation.images, policy.config) for observation in observations])
    state = None
    proprio = policy.config.stats(unnorm_key).proprio
    if policy.config.use_proprio and proprio is not None:
        rows = np.stack([normalised_state(proprio, observation.state) for observation in observations])
        state = torch.from_numpy(rows).to(weight.device, weight.dtype)
    ids = torch.from_numpy(input_ids).to(weight.device)
    return Inputs(torch.from_numpy(pixels).to(weight.device, weight.dtype), ids, state)
