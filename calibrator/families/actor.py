"""A torch policy that answers observations: the reference for engines, and what the simulators drive."""

from pathlib import Path

import numpy as np
import torch

from calibrator.families.base import Decisions, find_family
from calibrator.families.loading import load_policy
from calibrator.modules.policy import Inputs, Policy
from vla_policy.core.families.base import Policy as RobotPolicy
from vla_policy.core.observation import Decision, Observation, finite
from vla_policy.core.policy_config import PolicyConfig


class TorchActor:
    """A torch policy between the robot's own preprocessing and what its decisions mean."""

    def __init__(self, policy: Policy, robot: RobotPolicy, decisions: Decisions, unnorm_key: str) -> None:
        self.policy = policy
        self.robot = robot
        self.decisions = decisions
        self.unnorm_key = unnorm_key

    @staticmethod
    def load(folder: Path | str, unnorm_key: str | None = None, dtype: torch.dtype = torch.float32) -> "TorchActor":
        """The actor for the policy in `folder`; see `load_policy` for errors, and `unnorm_key` of PolicyConfig."""
        parts = _parts(PolicyConfig.load(folder), folder, unnorm_key)
        return TorchActor(load_policy(folder, dtype), *parts)

    @staticmethod
    def of(policy: Policy, folder: Path | str, unnorm_key: str | None = None) -> "TorchActor":
        """The actor for a policy that was loaded from `folder`."""
        return TorchActor(policy, *_parts(policy.config, folder, unnorm_key))

    @property
    def config(self) -> PolicyConfig:
        return self.policy.config

    def check_instruction(self, instruction: str) -> None:
        self.robot.check_instruction(instruction)

    def act(self, observation: Observation) -> Decision:
        inputs = self.inputs(observation)
        return self.decisions.decision(self.policy.decide(inputs, self.decisions.size)[0].cpu().numpy())

    def scores(self, observation: Observation, tokens: np.ndarray) -> np.ndarray:
        """float32 [rows, values]: what an engine's answer along the decided `tokens` is compared with; the action
        tokens' logits, or, of a policy without tokens, its normalised actions. Raises EngineError unless finite."""
        return self.scores_and_stray(observation, tokens)[0]

    @torch.no_grad()
    def scores_and_stray(self, observation: Observation, tokens: np.ndarray) -> tuple[np.ndarray, bool]:
        """`scores`, and whether the policy would rather answer something that is no action."""
        output = self.policy.output(self.inputs(observation), self.policy.tensor(tokens[None]))
        scores = finite(self.decisions.scores(output)[0].cpu().numpy(), "torch policy: output")
        return scores, bool(self.decisions.strays(output)[0])

    def inputs(self, observation: Observation) -> Inputs:
        """One observation as the policy's inputs, in its own preprocessing."""
        return self.policy.tensors([self.robot.inputs(observation)])


def _parts(
    config: PolicyConfig, folder: Path | str, unnorm_key: str | None
) -> tuple[RobotPolicy, Decisions, str]:
    key = config.unnorm_key(unnorm_key)
    return config.family.policy(config, Path(folder), key), find_family(config).decisions(config, key), key
