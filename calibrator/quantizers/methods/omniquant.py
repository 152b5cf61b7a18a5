"""OmniQuant's learnable weight clipping (Shao et al., arXiv:2308.13137, Eq. 2), learned for each layer by itself.

The largest magnitude of a group, which fixes its scale, is multiplied with sigmoid(g); g starts at 4, as published, and
is learned with Adam through rounding (straight through) from the layer's output over a calibration set,

    loss = tr((Q(W) - W) E[x x^T] (Q(W) - W)^T)

Left out: the loss over a whole block, its learnable equivalent transformation, and clipping the two signs apart, since
codes here are symmetric. Of all steps every row keeps the one that lost least; the first tried is round-to-nearest.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from calibrator.quantizers.base import LayerStatistics, Needs
from calibrator.quantizers.methods.rtn import levels
from calibrator.quantizers.weights import QuantizedWeight, by_groups, half
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format, Parameter

_START = 4.0


class LearnedClipping:
    """See the module. A group of zeros gets scale 1."""

    version = 1
    defaults: Mapping[str, Parameter] = {"steps": 100, "learning_rate": 0.05}
    needs = Needs.INPUTS

    def quantize(
        self, weight: Tensor, fmt: Format, parameters: Mapping[str, Parameter], statistics: LayerStatistics | None
    ) -> QuantizedWeight:
        assert statistics is not None and statistics.second_moment is not None
        steps, rate = int(parameters["steps"]), float(parameters["learning_rate"])
        if steps < 1 or not rate > 0:
            raise ArtefactError(f"omniquant: steps={steps}, learning_rate={rate:g}: expected at least 1, and above 0")
        moment = statistics.second_moment.to(weight.device, torch.float32)
        return by_groups(weight, fmt, lambda grouped: _learned(grouped, moment, fmt.weight_bits, steps, rate))


def _learned(grouped: Tensor, moment: Tensor, bits: int, steps: int, rate: float) -> tuple[Tensor, Tensor]:
    """Codes of float32 [rows, groups, size], and the scales [rows, groups]; rows do not depend on each other."""
    limits, inputs = levels(bits), len(moment)
    peak = grouped.abs().amax(-1)

    def scales_of(part: Tensor) -> Tensor:
        return torch.where(peak > 0, half(peak * part / limits.top), torch.ones_like(peak))

    def rounded(scales: Tensor) -> Tensor:
        return (grouped / scales[..., None]).round().clamp(limits.low, limits.high)

    def lost(values: Tensor) -> Tensor:
        change = (values - grouped).flatten(1)[:, :inputs]
        return ((change @ moment) * change).sum(-1)

    best = scales_of(torch.ones_like(peak))
    least = lost(rounded(best) * best[..., None])
    free = torch.full_like(peak, _START).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            part = free.sigmoid()
            smooth = torch.where(peak > 0, peak * part / limits.top, torch.ones_like(peak))
            scales = smooth + (scales_of(part.detach()) - smooth).detach()
            inside = (grouped / scales[..., None]).clamp(limits.low, limits.high)
            codes = inside + (inside.round() - inside).detach()
            loss = lost(codes * scales[..., None])
            better = loss.detach() < least
            least = torch.where(better, loss.detach(), least)
            best = torch.where(better[:, None], scales.detach(), best)
            optimizer.zero_grad()
            (loss / least.clamp_min(torch.finfo(torch.float32).tiny)).sum().backward()
            optimizer.step()
    return rounded(best), best


QUANTIZER = LearnedClipping()
