"""AWQ's clipping (Lin et al., arXiv:2306.00978, and its published code): round-to-nearest of weights that are cut off.

A group's largest magnitude, which fixes its scale, is shrunk by 0, 1/`grid`, ... up to `most`; what loses least of the
group's own part of the output is kept, with H_g the group's block of E[x x^T]:

    minimise over the shrinkage   (Q(w_g) - w_g)^T H_g (Q(w_g) - w_g)

Codes are all of two's complement, as in the published code without zero points. The other half of AWQ, scales of input
channels, is the transform of the same name. As published, layers whose outputs meet in a product (queries and keys) are
not clipped there; that is a matter of the plan's recipes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from calibrator.quantizers.base import LayerStatistics, Needs
from calibrator.quantizers.methods.rtn import levels
from calibrator.quantizers.weights import QuantizedWeight, by_groups, code_range, groups_per_row, half
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format, Parameter


class Clipping:
    """See the module. A group of zeros gets scale 1. Of equal losses the least shrinkage wins, so none is the rule."""

    version = 1
    defaults: Mapping[str, Parameter] = {"grid": 20, "most": 0.5}
    needs = Needs.INPUTS

    def quantize(
        self, weight: Tensor, fmt: Format, parameters: Mapping[str, Parameter], statistics: LayerStatistics | None
    ) -> QuantizedWeight:
        assert statistics is not None and statistics.second_moment is not None
        grid, most = int(parameters["grid"]), float(parameters["most"])
        if grid < 1 or not 0 <= most < 1:
            raise ArtefactError(f"awq: grid={grid}, most={most:g}: expected at least 1, and a part from 0 to below 1")
        blocks = group_moments(statistics.second_moment.to(weight.device), fmt)
        top, (low, high) = levels(fmt.weight_bits).top, code_range(fmt.weight_bits)

        def clipped(grouped: Tensor) -> tuple[Tensor, Tensor]:
            peak = grouped.abs().amax(-1)
            whole = torch.where(peak > 0, half(peak / top), torch.ones_like(peak))
            scales, codes, least = whole, torch.zeros_like(grouped), torch.full_like(peak, torch.inf)
            for step in range(int(most * grid + 1e-9) + 1):
                tried = torch.where(peak > 0, half(peak * (1 - step / grid) / top), whole)
                found = (grouped / tried[..., None]).round_().clamp_(low, high)
                change = found * tried[..., None] - grouped
                lost = (torch.einsum("rgi,gij->rgj", change, blocks) * change).sum(-1)
                better = lost < least
                least, scales = torch.where(better, lost, least), torch.where(better, tried, scales)
                codes = torch.where(better[..., None], found, codes)
            return codes, scales

        return by_groups(weight, fmt, clipped)


def group_moments(moment: Tensor, fmt: Format) -> Tensor:
    """The blocks of E[x x^T] that groups of inputs see, float32 [groups, size, size]; filled up with zeros."""
    inputs = len(moment)
    groups, size = groups_per_row(inputs, fmt), fmt.group_size or inputs
    filled = functional.pad(moment, (0, groups * size - inputs) * 2).view(groups, size, groups, size)
    return filled.diagonal(dim1=0, dim2=2).permute(2, 0, 1).float()


QUANTIZER = Clipping()
