"""The scale with the least squared error, and all codes of two's complement. Per group or output channel:

    minimise sum (w - scale * code)^2 over scale > 0 in float16,   code = clamp(round(w / scale), -2^(b-1), 2^(b-1) - 1)

`steps` scales in geometric order are tried, from one that leaves room above the largest weight (at some groups its
codes fall on the weights by luck) to one that clips what lies beyond 0.4 (b + 2) root mean squares; of normal weights
the best clips at 2.0, 2.3, 2.7 and 3.9 for 2, 3, 4 and 8 bits. The best is refined twice by least squares for its own
codes, scale = <w, code> / <code, code>. Every candidate is rounded to float16 before it is judged, and the scale of
round-to-nearest is one of them, so the error is never above that method's.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from calibrator.quantizers.base import LayerStatistics, Needs
from calibrator.quantizers.methods.rtn import levels
from calibrator.quantizers.turning import InputOperator
from calibrator.quantizers.weights import QuantizedWeight, by_groups, code_range, half
from vla_policy.core.formats import Format, Parameter

STEPS = 32
_ROOM = 4 / 3
_REFINEMENTS = 2


class LeastSquares:
    """See the module. A group of zeros gets scale 1."""

    version = 1
    defaults: Mapping[str, Parameter] = {"steps": STEPS}
    needs = Needs.NOTHING

    def quantize(
        self, weight: Tensor, fmt: Format, parameters: Mapping[str, Parameter], statistics: LayerStatistics | None
    ) -> QuantizedWeight:
        steps = int(parameters["steps"])
        return by_groups(weight, fmt, lambda grouped: search(grouped, fmt.weight_bits, steps))


def through(operator: InputOperator, weight: Tensor, fmt: Format) -> QuantizedWeight:
    """The codes of what multiplies a layer's input behind its operator; that is found in float64."""
    here = operator.to(weight.device)
    turned = here.weight(weight.detach().flatten(1).double()).float()
    found = by_groups(turned, fmt, lambda grouped: search(grouped, fmt.weight_bits))
    return replace(found, shape=tuple(weight.shape), operator=here)


def search(grouped: Tensor, bits: int, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Codes of float32 [..., size], and the scales [...] of their groups."""
    low, high = code_range(bits)
    peak, size = grouped.abs().amax(-1), grouped.square().mean(-1).sqrt()

    def codes(scales: Tensor) -> Tensor:
        return (grouped / scales[..., None]).round_().clamp_(low, high)

    def error(scales: Tensor) -> Tensor:
        return codes(scales).mul_(scales[..., None]).sub_(grouped).square_().sum(-1)

    best = half(peak / levels(bits).top)
    least = error(best)

    def judge(scales: Tensor) -> None:
        found = error(scales)
        better = found < least
        least[better], best[better] = found[better], scales[better]

    largest = _ROOM * peak
    smallest = 0.9 * torch.minimum(peak, 0.4 * (bits + 2) * size)
    for step in range(steps):
        judge(half(largest * (smallest / largest) ** (step / max(1, steps - 1)) / -low))
    for _ in range(_REFINEMENTS):
        found = codes(best)
        judge(half((grouped * found).sum(-1) / found.square().sum(-1)))
    best = torch.where(peak > 0, best, torch.ones_like(best))
    return codes(best), best


QUANTIZER = LeastSquares()
