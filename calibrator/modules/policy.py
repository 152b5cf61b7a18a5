"""What every policy in torch can do, whatever it is made of."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from calibrator.modules.chain import DECIDED, PAD, Chain
from calibrator.modules.gemma import Attention
from calibrator.quantizers.apply import computes_in
from vla_policy.core.policy_config import PolicyConfig

Inputs = Mapping[str, Tensor]
"""What B states give a policy: the first values of its chain. The first axis is B."""


class Policy(nn.Module):
    """A policy as torch modules; attribute paths equal the published tensor names.

    pads_prompts: whether prompts of different lengths may share a pass along its chain, the shorter ones filled up at
    their right end with `PAD`.
    """

    pads_prompts = False

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config

    def chain(self, language_block: int | None = None) -> Chain:
        """The policy's segments. language_block: whose input is the language boundary, None for the last one.

        Raises PolicyError where there is no such block.
        """
        raise NotImplementedError

    def action_attention(self) -> Mapping[str, Attention]:
        """By path, the attention of a part that makes actions and nothing else; none where the language model does."""
        return {}

    def redrawn(self, inputs: Inputs, folder: Path) -> list[Inputs]:
        """The same states with other random numbers, of a policy whose decisions begin with some; else nothing.

        folder: of the policy.
        """
        return []

    def decide(self, inputs: Inputs, size: int) -> Tensor:
        """The decision that the policy takes by itself, [B, size] in the form of its family's `Decisions`."""
        raise NotImplementedError

    def output(self, inputs: Inputs, decided: Tensor) -> Tensor:
        """What the policy answers when it is held to `decided` [B, size]: its chain's last value."""
        chain = self.chain()
        return chain.run({**inputs, DECIDED: decided})[chain.output]

    def tensors(self, states: Sequence[Mapping[str, np.ndarray]]) -> Inputs:
        """The inputs of several states, as the robot's side of the policy makes them, in one batch on the device."""
        return {name: self.tensor(_stacked([state[name] for state in states])) for name in states[0]}

    def tensor(self, values: np.ndarray) -> Tensor:
        """`values` on the policy's device; floating-point numbers in the type that it computes in."""
        found = torch.from_numpy(values).to(next(self.parameters()).device)
        return found.to(computes_in(self)) if found.is_floating_point() else found


def _stacked(values: Sequence[np.ndarray]) -> np.ndarray:
    """Along the first axis; of rows of ids the shorter ones filled up."""
    longest = max(one.shape[-1] for one in values)
    if all(one.shape[-1] == longest for one in values):
        return np.concatenate(values)
    return np.concatenate([np.pad(one, ((0, 0), (0, longest - one.shape[-1])), constant_values=PAD) for one in values])
