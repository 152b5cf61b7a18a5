"""DuQuant (Lin et al., arXiv:2406.01721): outliers of the input are spread by rotations in blocks and a permutation.

The layer multiplies x R1 P R2 by W R1 P R2, each R block-diagonal and orthogonal, P a permutation of the channels, so
that nothing changes but what rounding sees; see `quantizers.turning`. On inputs of the calibration set

- R (Sec. 3.2, Eq. 2 and 3) is a product of up to `steps` matrices E H Q E: E exchanges the first channel with the one
  that holds the largest |x|, H is orthogonal with a uniform first row, which spreads it evenly, and Q turns the others
  at random. Of all products the one after which the largest |x| is smallest is taken; none is one of them.
- P (Sec. 3.3) deals the channels out in zigzag, the largest first, so that all blocks have their share.

With one rotation it is P R. `shared`: one R for all blocks of a layer, as the authors'
code has it, or one for each, as the text. Weights are rounded with the scale of least squared error (`methods.mse`).

Left out: smoothing, which is the transform `smoothquant` and may go before; clipping of activations. What is looked at
are up to 128 inputs, half of them those with the largest values, half taken at random, where the paper has all.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from calibrator.quantizers.base import LayerStatistics, Needs
from calibrator.quantizers.methods.mse import through
from calibrator.quantizers.turning import InputOperator, Turn, turn_bits
from calibrator.quantizers.weights import QuantizedWeight
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format, Parameter


class DuQuant:
    """See the module. block: channels that are turned together."""

    version = 1
    defaults: Mapping[str, Parameter] = {"block": 64, "rotations": 2, "steps": 256, "shared": True}
    needs = Needs.INPUTS

    def operator_bits(self, inputs: int, parameters: Mapping[str, Parameter]) -> int:
        size = min(int(parameters["block"]), inputs)
        matrices = 1 if parameters["shared"] else inputs // size
        return int(parameters["rotations"]) * turn_bits(inputs, size, matrices)

    def quantize(
        self, weight: Tensor, fmt: Format, parameters: Mapping[str, Parameter], statistics: LayerStatistics | None
    ) -> QuantizedWeight:
        assert statistics is not None and statistics.rows is not None
        return through(found_operator(statistics.rows, parameters), weight, fmt)


def found_operator(rows: Tensor, parameters: Mapping[str, Parameter]) -> InputOperator:
    """The operator for inputs like `rows` [n, in]. Raises ArtefactError for parameters out of range."""
    block, rotations, steps = (int(parameters[name]) for name in ("block", "rotations", "steps"))
    if block < 2 or rotations < 1 or steps < 0:
        raise ArtefactError(
            f"duquant: block={block}, rotations={rotations}, steps={steps}: expected at least 2, 1 and 0"
        )
    inputs = rows.shape[1]
    size = min(block, inputs)
    seen, found = rows.float(), []
    for number in range(rotations):
        first_of_several = number == 0 and rotations > 1
        order = torch.arange(inputs) if first_of_several else zigzag(seen.abs().amax(0), size)
        whole = inputs - inputs % size
        blocks = seen[:, order][:, :whole].unflatten(1, (-1, size)).transpose(0, 1)  # [blocks, n, size]
        rotation = greedy_rotation(blocks.flatten(0, 1)[None] if parameters["shared"] else blocks, steps)
        found.append((order, rotation))
        seen = Turn(order, rotation.float()).apply(seen)
    return InputOperator.of(found)


def zigzag(peaks: Tensor, size: int) -> Tensor:
    """The order [in] in which channels are dealt out to blocks of `size`, the largest of `peaks` [in] first, from the
    first block to the last and back; the smallest, which fill no block, come last."""
    falling = peaks.argsort(descending=True, stable=True)
    blocks = len(peaks) // size
    rounds = falling[: blocks * size].view(size, blocks).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return torch.cat([rounds.T.flatten(), falling[blocks * size :]])


def greedy_rotation(x: Tensor, steps: int) -> Tensor:
    """Orthogonal matrices [n, size, size], float64, that make the largest |x| of x [n, tokens, size] small."""
    count, _, size = x.shape
    total = torch.eye(size, dtype=torch.float64).repeat(count, 1, 1)
    best, least = total.clone(), x.abs().amax((1, 2))
    for turn in _turns(size, steps):
        outlier = x.abs().amax(1).argmax(1)
        matrix = turn.repeat(count, 1, 1)
        every, first = torch.arange(count), torch.zeros_like(outlier)
        for rows in (True, False):  # E H Q E: rows, then columns, 0 and the outlier's exchanged
            view = matrix if rows else matrix.mT
            view[every, first], view[every, outlier] = view[every, outlier].clone(), view[every, first].clone()
        x, total = x @ matrix.to(x), total @ matrix
        largest = x.abs().amax((1, 2))
        better = largest < least
        least = torch.where(better, largest, least)
        best = torch.where(better[:, None, None], total, best)
    return best


@lru_cache(maxsize=4)
def _turns(size: int, steps: int) -> tuple[Tensor, ...]:
    """H Q of every step, float64 [size, size]."""
    generator = torch.Generator().manual_seed(size)
    along = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    along[0] += 1.0
    # The reflection that exchanges the first axis with the diagonal.
    spread = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(along, along) / along.square().sum()
    found = []
    for _ in range(steps):
        free = torch.randn(size - 1, size - 1, generator=generator, dtype=torch.float64)
        mixed = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), torch.linalg.qr(free)[0])
        found.append(spread @ mixed)
    return tuple(found)


QUANTIZER = DuQuant()
