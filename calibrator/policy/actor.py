"""A torch policy that answers observations: the reference for engines, and what the simulators drive."""

from pathlib import Path

import torch

from calibrator.policy.loading import load_policy
from calibrator.policy.model import OpenVLA
from vla_policy.core.actions import ActionCodec
from vla_policy.core.image import pixel_values
from vla_policy.core.observation import Decision, Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prompt import PromptTokenizer


class TorchActor:
    """Preprocessing, prompt and un-normalisation around a policy; the same core as the robot's."""

    def __init__(self, policy: OpenVLA, tokenizer: PromptTokenizer, codec: ActionCodec) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.codec = codec

    @staticmethod
    def load(folder: Path | str, unnorm_key: str | None = None, dtype: torch.dtype = torch.float32) -> "TorchActor":
        """The actor for the policy in `folder`; see `load_policy` for errors."""
        policy = load_policy(folder, dtype)
        return TorchActor(
            policy, PromptTokenizer(folder, policy.config, unnorm_key), ActionCodec.of(policy.config, unnorm_key)
        )

    @property
    def config(self) -> PolicyConfig:
        return self.policy.config

    def act(self, observation: Observation) -> Decision:
        weight = self.policy.projector.fc1.weight
        pixels = torch.from_numpy(pixel_values(observation.images, self.config))
        ids = torch.from_numpy(self.tokenizer.encode(observation.instruction, observation.state))
        tokens = self.policy.generate(
            pixels[None].to(weight.device, weight.dtype), ids[None].to(weight.device), self.codec.dim
        )
        chosen = tokens[0].cpu().numpy()
        return Decision(chosen, self.codec.tokens_to_action(chosen))
