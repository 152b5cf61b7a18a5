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
from torch.nn import functional

from calibrator.quantizers.base import LayerStatistics
from calibrator.quantizers.methods.rtn import levels
from calibrator.quantizers.weights import QuantizedWeight, groups_per_row, half
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.formats import Format, Parameter

_START = 4.0


class LearnedClipping:
    """See the module. A group of zeros gets scale 1."""

    version = 1
    defaults: Mapping[str, Parameter] = {"steps": 100, "learning_rate": 0.05}
    needs_statistics = True

    def quantize(
        self, weight: Tensor, fmt: Format, parameters: Mapping[str, Parameter], statistics: LayerStatistics | None
    ) -> QuantizedWeight:
        assert statistics is not None and statistics.second_moment is not None
        steps, rate = int(parameters["steps"]), float(parameters["learning_rate"])
        if steps < 1 or not rate > 0:
            raise ArtefactError(f"omniquant: steps={steps}, learning_rate={rate:g}: expected at least 1, and above 0")
        rows, limits = weight.detach().flatten(1).float(), levels(fmt.weight_bits)
        outputs, inputs = rows.shape
        groups, size = groups_per_row(inputs, fmt), fmt.group_size or inputs
        grouped = functional.pad(rows, (0, groups * size - inputs)).view(outputs, groups, size)
        moment = statistics.second_moment.to(rows)
        peak = grouped.abs().amax(-1)
        if not bool(half(peak / limits.top).isfinite().all()):
            raise PolicyError(f"weight of shape {list(weight.shape)}: scales in {fmt} exceed float16; keep 16 bits")

        def rounded(scales: Tensor) -> Tensor:
            return (grouped / scales[..., None]).round().clamp(limits.low, limits.high)

        def scales_of(part: Tensor) -> Tensor:
            return torch.where(peak > 0, half(peak * part / limits.top), torch.ones_like(peak))

        def lost(change: Tensor) -> Tensor:
            return ((change @ moment) * change).sum(-1)

        best = scales_of(torch.ones_like(peak))
        least = lost((rounded(best) * best[..., None] - grouped).flatten(1)[:, :inputs])
        free = torch.full_like(peak, _START).requires_grad_()
        optimizer = torch.optim.Adam([free], lr=rate)
        with torch.enable_grad():
            for _ in range(steps):
                part = free.sigmoid()
                smooth = torch.where(peak > 0, peak * part / limits.top, torch.ones_like(peak))
                scales = smooth + (scales_of(part.detach()) - smooth).detach()
                ratio = grouped / scales[..., None]
                inside = ratio.clamp(limits.low, limits.high)
                codes = inside + (inside.round() - inside).detach()
                loss = lost((codes * scales[..., None] - grouped).flatten(1)[:, :inputs])
                better = loss.detach() < least
                least = torch.where(better, loss.detach(), least)
                best = torch.where(better[:, None], scales.detach(), best)
                optimizer.zero_grad()
                (loss / least.clamp_min(torch.finfo(torch.float32).tiny)).sum().backward()
                optimizer.step()
        codes = rounded(best).to(torch.int8).view(outputs, -1)[:, :inputs].contiguous()
        return QuantizedWeight(codes, best, fmt, tuple(weight.shape))


QUANTIZER = LearnedClipping()
