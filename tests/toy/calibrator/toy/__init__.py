"""The toy policy in torch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from vla_policy.core.families.toy import ToyConfig, to_actions

from calibrator.families.base import Family
from calibrator.modules.chain import Chain, Layers, Runs, Segment, Stage
from calibrator.modules.policy import Inputs, Policy
from vla_policy.core.observation import Decision

BLOCKS = 2


class ToyModel(Policy):
    """eye, bridge: patches to positions. feel: the state, added to all of them. body, hand: positions to actions."""

    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        width = config.width
        self.eye = nn.Linear(config.patch_values, width)
        self.bridge = nn.Linear(width, width)
        self.feel = nn.Linear(config.state_dim, width)
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(BLOCKS))
        self.hand = nn.Linear(width, config.action_dim)

    @torch.no_grad()
    def decide(self, inputs: Inputs, size: int) -> Tensor:
        return self.output(inputs, torch.zeros(0))

    def chain(self, language_block: int | None = None) -> Chain:
        block = BLOCKS - 1 if language_block is None else language_block
        patches, horizon = self.config.side**2, self.config.horizon

        def layers(path: str, stage: Stage, rows: int) -> tuple[Layers, ...]:
            return (Layers(path, f"the {path}", stage, f"toy {stage}", lambda *_: (Runs(rows),)),)

        def body(number: int) -> Segment:
            layer = self.body[number]
            mine = layers(f"body.{number}", "language", patches)
            return Segment(f"body {number}", (entering(number),), lambda x: x + torch.tanh(layer(x)), mine)

        def entering(number: int) -> str:
            return f"body {number - 1}" if number else "together"

        def actions(read: Tensor) -> Tensor:
            return torch.tanh(self.hand(read)).flatten(1)

        return Chain(
            preamble=(
                Segment("seen", ("patches",), self.eye, layers("eye", "vision", patches)),
                Segment("felt", ("state",), lambda state: self.feel(state)[:, None], layers("feel", "projector", 1)),
            ),
            trunk=(
                Segment("bridged", ("seen",), self.bridge, layers("bridge", "projector", patches)),
                Segment("together", ("bridged", "felt"), torch.add),
                *(body(number) for number in range(BLOCKS)),
                Segment("read", (entering(BLOCKS),), lambda x: x[:, :horizon]),
                Segment("actions", ("read",), actions, layers("hand", "head", horizon)),
            ),
            boundaries={
                "vision": "seen",
                "projector": "bridged",
                "language": entering(block),
                "head": "read",
            },
            language_block=block,
            image_grid=(self.config.side, self.config.side),
        )


@dataclass(frozen=True)
class ToyDecisions:
    """`output` and `decided` are normalised actions, float32 [B, H K]; J is how far the one goes along the other."""

    config: ToyConfig

    @property
    def size(self) -> int:
        return self.config.horizon * self.config.action_dim

    def objective(self, output: Tensor, decided: Tensor) -> Tensor:
        return (output * decided).sum(1) / decided.square().sum(1)

    def expected(self, output: Tensor) -> Tensor:
        return output

    def error(self, output: Tensor, decided: Tensor) -> Tensor:
        return (output.double() - decided.double()).square().sum(1)

    def scores(self, output: Tensor) -> Tensor:
        return output.unflatten(1, (self.config.horizon, -1))

    def strays(self, output: Tensor) -> Tensor:
        return torch.zeros(len(output), dtype=torch.bool)

    def decision(self, decided: np.ndarray) -> Decision:
        return Decision(np.zeros(0, np.int64), to_actions(self.config, decided))


FAMILY = Family(
    build=ToyModel,
    dead_tensors=lambda config: {"trained_with": (1,)},
    decisions=lambda config, unnorm_key: ToyDecisions(config),
)
