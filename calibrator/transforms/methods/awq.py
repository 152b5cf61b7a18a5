"""AWQ's scales of input channels (Lin et al., arXiv:2306.00978, Eq. 4 and 5): channels that see much are rounded finer.

    s_j = E|x_j|^ratio   or   E|x_j|^ratio / m_j^(1 - ratio),   ratio = 0, 1/20, ..., 19/20

divided by the square root of its largest times its smallest. m_j is the mean over outputs of column j's weights
relative to their group's largest, as the published code has it beside the paper's form. What is taken is whose weights,
scaled by s, rounded to nearest in such a format and scaled back, lose least of the outputs, E |(Q(W s) / s - W) x|^2
summed over the layers that read the input. The paper's search looks at a block's output; here it is the layers' own,
from E[x x^T].

Factors are the powers of two that will be folded. Of one layer's error by rounding to nearest they leave 71 %, exact
ones 57 %, and so it stays: policies are stored in bfloat16, where exact factors would round norms, and layers that keep
16 bits, once more, by about a quarter of what 8-bit codes in groups of 64 do; and what scores and engines are compared
with would no longer be the policy that was given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from calibrator.quantizers import LayerStatistics, parse_choice, quantize
from calibrator.transforms.fold import ChannelScaling, exact
from vla_policy.core.formats import Format, Parameter

_GRID = 20
_LEAST = 1e-4
"""Of a channel's mean magnitude, as in the published code."""


@dataclass(frozen=True)
class Awq(ChannelScaling):
    """See the module. bits, group: of the weights that the scales are for; group 0 is one scale per output."""

    version: int = 1
    defaults: Mapping[str, Parameter] = field(default_factory=lambda: {"bits": 4, "group": 64})
    needs_second_moments: bool = True
    after_layers: bool = True

    def factors(
        self, statistics: LayerStatistics, weights: Sequence[Tensor], parameters: Mapping[str, Parameter]
    ) -> Tensor:
        bits, group = int(parameters["bits"]), int(parameters["group"])
        choice = parse_choice(f"w{bits}a16{f'_g{group}' if group else ''}:rtn")
        assert statistics.second_moment is not None
        moment, means = statistics.second_moment.to(weights[0].device), statistics.means.to(weights[0].device)
        wide = [weight.detach().double() for weight in weights]
        least, best = torch.inf, torch.ones_like(means)
        columns = torch.stack([_relative(weight, choice.format) for weight in wide]).mean(0).float()
        for step, against in product(range(_GRID), (False, True)):
            powers = means.clamp_min(_LEAST).pow(step / _GRID)
            if against:
                powers = powers / columns.pow(1 - step / _GRID).clamp_min(_LEAST)
            tried = exact(powers / (powers.max() * powers.min()).sqrt())
            lost = 0.0
            for weight in wide:
                change = quantize((weight * tried).float(), choice).dequantize().double() / tried - weight
                lost += float(((change @ moment) * change).sum())
            if lost < least:
                least, best = lost, tried
        return best


def _relative(weight: Tensor, fmt: Format) -> Tensor:
    """Mean over outputs of |w| relative to the largest of its group, [in]."""
    size = fmt.group_size or weight.shape[1]
    parts = [part.abs() / part.abs().amax(1, keepdim=True).clamp_min(_LEAST) for part in weight.split(size, dim=1)]
    return torch.cat(parts, dim=1).mean(0)


TRANSFORM = Awq()
