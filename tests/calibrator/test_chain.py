"""Passes over a chain that is not a chain: values that are read more than once, past their neighbours."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from calibrator.modules.chain import Chain, Segment
from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.passes import Batch, Trunk, signals
from vla_policy.core.observation import Decision

WIDTH, STATES = 6, 3
READS = {
    "eye": ("pixels",),
    "vision": ("eye", "pixels"),
    "side": ("state",),
    "mixed": ("side",),
    "projector": ("vision",),
    "late": ("projector", "vision"),
    "states": ("late", "mixed", "vision"),
    "output": ("states", "projector"),
}
PREAMBLE = ("eye", "vision", "side", "mixed")


class FakeDecisions:
    """J is a cubic form, so that gradients depend on where they are taken."""

    size = WIDTH

    def objective(self, output: Tensor, decided: Tensor) -> Tensor:
        return (output.flatten(1) ** 3 * decided.repeat(1, 2)).sum(1)

    def expected(self, output: Tensor) -> Tensor:
        raise NotImplementedError

    def error(self, output: Tensor, decided: Tensor) -> Tensor:
        raise NotImplementedError

    def scores(self, output: Tensor) -> Tensor:
        raise NotImplementedError

    def strays(self, output: Tensor) -> Tensor:
        raise NotImplementedError

    def decision(self, decided: np.ndarray) -> Decision:
        raise NotImplementedError


def made(weights: Mapping[str, Tensor], name: str, values: list[Tensor]) -> Tensor:
    return torch.tanh(torch.cat(values, -1) @ weights[name])


def chain_of(weights: Mapping[str, Tensor]) -> Chain:
    def segment(name: str) -> Segment:
        return Segment(name, READS[name], lambda *values: made(weights, name, list(values)))

    return Chain(
        preamble=tuple(segment(name) for name in PREAMBLE),
        trunk=tuple(segment(name) for name in READS if name not in PREAMBLE),
        boundaries={"vision": "vision", "projector": "projector", "language": "late", "head": "states"},
        language_block=0,
        image_grid=(1, 2),
    )


@pytest.mark.parametrize("changed", READS)
def test_what_depends_on_a_changed_segment_is_computed_again_and_nothing_is_missed(changed: str) -> None:
    """Oracle: everything from the start, and autograd from J to every boundary."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(len(reads) * WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
        for name, reads in READS.items()
    }
    inputs = {
        name: torch.randn(STATES, 2, WIDTH, generator=generator, dtype=torch.float64) for name in ("pixels", "state")
    }
    decided = torch.randn(STATES, WIDTH, generator=generator, dtype=torch.float64)
    batch = Batch((0, 1, 2), inputs, decided, FakeDecisions())
    trunk = Trunk(chain_of(weights), batch)
    weights[changed] = weights[changed] * 1.1
    got = signals(trunk, changed)

    values = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    for name, reads in READS.items():
        values[name] = made(weights, name, [values[read] for read in reads])
        values[name].retain_grad()
    objective = batch.objective(values["output"])
    objective.sum().backward()
    torch.testing.assert_close(got.objective, objective.detach())
    torch.testing.assert_close(got.output, values["output"].detach())
    assert tuple(got.hidden) == BOUNDARIES
    for boundary, name in trunk.chain.boundaries.items():
        torch.testing.assert_close(got.hidden[boundary], values[name].detach())
        torch.testing.assert_close(got.gradients[boundary], values[name].grad)
