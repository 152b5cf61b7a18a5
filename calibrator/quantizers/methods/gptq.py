"""GPTQ (Frantar et al., arXiv:2210.17323): the columns to come make up for every column's rounding error.

With H = E[x x^T] of the layer's inputs, `damping` times its mean diagonal added to the diagonal, and R the upper factor
of H^-1 = R^T R (the paper's Cholesky form), columns are rounded one after another:

    error = (w_i - Q(w_i)) / R[i, i],    w_j -= error R[i, j] for all columns j after i

so that E |(Q(W) - W) x|^2 stays small instead of |Q(W) - W|^2. A group's scale is searched (`methods.mse`) when its
first column is reached, on the weights as they are then. With `act_order` columns of large inputs come first; groups
stay consecutive inputs, as engines hold them, so their scales are then found on the weights as they were. A row that
would lose less by round-to-nearest is rounded so: no row loses more than that on the calibration inputs.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calibrator.quantizers.base import LayerStatistics, Needs
from calibrator.quantizers.methods.mse import search
from calibrator.quantizers.methods.rtn import QUANTIZER as NEAREST
from calibrator.quantizers.weights import QuantizedWeight, code_range, groups_per_row
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format, Parameter

_BLOCK = 128  # columns whose effect on the later ones is added at once


class Gptq:
    """See the module. Arithmetic is float64."""

    version = 1
    defaults: Mapping[str, Parameter] = {"damping": 0.01, "act_order": False}
    needs = Needs.INPUTS

    def quantize(
        self, weight: Tensor, fmt: Format, parameters: Mapping[str, Parameter], statistics: LayerStatistics | None
    ) -> QuantizedWeight:
        assert statistics is not None and statistics.second_moment is not None
        nearest = NEAREST.quantize(weight, fmt, {}, None)
        rows, moment = weight.detach().flatten(1).double(), statistics.second_moment.to(weight.device)
        early = bool(parameters["act_order"])
        order = moment.diagonal().argsort(descending=True, stable=True) if early else torch.arange(len(moment))
        factor = inverse_factor(moment[order][:, order], float(parameters["damping"]))
        codes, scales = _round_columns(rows, factor, order.tolist(), fmt, scales_first=early)
        found = QuantizedWeight(codes, scales, fmt, tuple(weight.shape))
        worse = lost_outputs(weight, found, moment) > lost_outputs(weight, nearest, moment)
        codes[worse], scales[worse] = nearest.codes[worse], nearest.scales[worse]
        return found


def lost_outputs(weight: Tensor, result: QuantizedWeight, moment: Tensor) -> Tensor:
    """E |(Q(w) - w) x|^2 of every row, float64 [out]."""
    change = (result.seen_from_outside() - weight.detach().double()).flatten(1)
    return ((change @ moment) * change).sum(1)


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """Upper R with R^T R = H^-1, [in, in]. Raises ArtefactError for a damping with which there is no H^-1."""
    damped = moment.clone()
    damped.diagonal().add_(damping * moment.diagonal().mean())
    # From H = U U^T with U upper, which is the Cholesky factor of H in reverse order: R = U^-1.
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed):
        raise ArtefactError(f"gptq: inputs with damping {damping:g} have no inverse; use more damping, as the default")
    upper = lower.flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True)


def _round_columns(
    rows: Tensor, factor: Tensor, order: Sequence[int], fmt: Format, scales_first: bool
) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scales float32 [out, groups]. order: of the columns, to which `factor` belongs."""
    outputs, inputs = rows.shape
    size, groups = fmt.group_size or inputs, groups_per_row(inputs, fmt)
    low, high = code_range(fmt.weight_bits)
    codes = torch.zeros(outputs, inputs, dtype=torch.int8, device=rows.device)
    scales = torch.zeros(outputs, groups, device=rows.device)
    if scales_first:
        for group in range(groups):
            scales[:, group] = search(rows[:, group * size : (group + 1) * size].float(), fmt.weight_bits)[1]
    left = rows[:, order]
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        errors = torch.zeros(outputs, end - start, dtype=torch.float64, device=rows.device)
        for place in range(start, end):
            column = order[place]
            group = column // size
            if not scales_first and column % size == 0:
                # The group may reach beyond the block, whose effect on what follows is not added yet.
                now = left[:, place : place + size].clone()
                now[:, end - place :] -= errors @ factor[start:end, end : place + size]
                scales[:, group] = search(now.float(), fmt.weight_bits)[1]
            scale = scales[:, group].double()
            code = (left[:, place] / scale).round_().clamp_(low, high)
            codes[:, column] = code.to(torch.int8)
            error = (left[:, place] - code * scale) / factor[place, place]
            left[:, place:end] -= error[:, None] * factor[place, place:end]
            errors[:, place - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    return codes, scales


QUANTIZER = Gptq()
