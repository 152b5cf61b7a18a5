"""Forward and backward passes that a quantized layer shares with full precision.

When one layer is quantized, everything before it is the full-precision pass and everything after it is not. A `Trunk`
is the full-precision pass of one batch, kept with its graph from the first boundary on. `signals` computes again what
depends on the quantized layer, and sends the gradient that arrives there down the trunk's graph to the earlier
boundaries. No gradient is taken with respect to weights, and none goes below the first boundary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrator.families import Decisions, Inputs
from calibrator.modules.chain import DECIDED, Chain, Segment, run_segments


@dataclass(frozen=True)
class Batch:
    """Calibration states of equal shapes.

    samples: their indices in the calibration set. decided: [B, D], y* of Eq. (2): the full-precision decision.
    """

    samples: tuple[int, ...]
    inputs: Inputs
    decided: Tensor
    decisions: Decisions

    @property
    def values(self) -> dict[str, Tensor]:
        """What a chain's segments may read from the start."""
        return {**self.inputs, DECIDED: self.decided}

    def objective(self, output: Tensor) -> Tensor:
        """J of Eq. (2), float32 [B], of a policy's output for these states."""
        return self.decisions.objective(output, self.decided)


@dataclass(frozen=True)
class Signals:
    """What a pass gives: per boundary H and dJ/dH [B, tokens, channels]; J [B]; the policy's output, float32."""

    hidden: dict[str, Tensor]
    gradients: dict[str, Tensor]
    objective: Tensor
    output: Tensor


class Trunk:
    """The full-precision pass of one batch: every value by name, with the graph from the first boundary to J."""

    def __init__(self, chain: Chain, batch: Batch, differentiable: bool = True) -> None:
        self.chain = chain
        self.batch = batch
        with torch.no_grad():
            values = run_segments(chain.preamble, batch.values)
        with torch.set_grad_enabled(differentiable):
            for name in chain.boundaries.values():
                if name in values:
                    values[name].requires_grad_(differentiable)
            self.values = run_segments(chain.trunk, values)

    def signals(self) -> Signals:
        """The full-precision signals, by one backward pass through the graph."""
        with torch.enable_grad():
            objective = self.batch.objective(self.values[self.chain.output])
            points = list(self.chain.boundaries.values())
            found = torch.autograd.grad(objective.sum(), [self.values[name] for name in points], retain_graph=True)
        return _signals(self.chain, self.values, dict(zip(points, found, strict=True)), objective)


def signals(trunk: Trunk, segment: str) -> Signals:
    """Activations and gradients at the boundaries with the policy as it is now.

    segment: the one that holds the only layer that differs from full precision. With an unchanged policy, any segment
    gives the full-precision signals.
    """
    chain, full = trunk.chain, trunk.values
    with torch.no_grad():
        changed = _changed(chain.preamble, full, segment)
    start = next(
        place
        for place, one in enumerate(chain.trunk)
        if one.name == segment or not changed.keys().isdisjoint(one.reads)
    )
    rest = chain.trunk[start:]
    made = {one.name for one in rest}
    # Where the gradient leaves what is computed again: values of the full-precision graph.
    entries = [name for one in rest for name in one.reads if name not in made and full[name].requires_grad]
    entries = list(dict.fromkeys(entries))
    behind = [name for name in chain.boundaries.values() if name in made]
    before = [name for name in chain.boundaries.values() if name not in made]
    values = {**full, **changed}
    with torch.enable_grad():
        for name in entries:
            values[name] = values[name].detach().requires_grad_()
        values = run_segments(rest, values)
        objective = trunk.batch.objective(values[chain.output])
        found = torch.autograd.grad(objective.sum(), [values[name] for name in [*entries, *behind]])
    arriving, gradients = found[: len(entries)], dict(zip(behind, found[len(entries) :], strict=True))
    if before:
        at = [full[name] for name in entries], [full[name] for name in before]
        gradients |= zip(before, torch.autograd.grad(*at, arriving, retain_graph=True), strict=True)
    return _signals(chain, values, gradients, objective)


@torch.no_grad()
def output(trunk: Trunk, segment: str) -> Tensor:
    """The policy's output as it is now, without gradients. segment: see `signals`."""
    full = trunk.values
    return _changed(trunk.chain.segments, full, segment).get(trunk.chain.output, full[trunk.chain.output])


def _changed(segments: Sequence[Segment], full: Mapping[str, Tensor], segment: str) -> dict[str, Tensor]:
    """Of the segments' values those that depend on one of them, computed again."""
    changed: dict[str, Tensor] = {}
    for one in segments:
        if one.name == segment or not changed.keys().isdisjoint(one.reads):
            changed[one.name] = one.run(*(changed.get(name, full[name]) for name in one.reads))
    return changed


def _signals(chain: Chain, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor], objective: Tensor) -> Signals:
    return Signals(
        hidden={boundary: values[name].detach() for boundary, name in chain.boundaries.items()},
        gradients={boundary: gradients[name] for boundary, name in chain.boundaries.items()},
        objective=objective.detach(),
        output=values[chain.output].detach(),
    )
