"""The rotation of QuantVLA (arXiv:2602.20309) as its published code has it; its text refers to DuQuant's.

The layer multiplies x P R by W P R, P a permutation of the channels and R orthogonal in blocks of `block`, so that
nothing changes but what rounding sees; see `quantizers.turning`. Both are found from the weight alone:

- P puts the channels in the order largest, smallest, second largest, second smallest, ... of mean w^2 over the outputs;
- R of a block are the right singular vectors of the weight's columns in it, largest first: the turned weight has
  columns that are orthogonal within a block, and as few of them as can be hold most of it.

So it compacts the weight and does not look at outliers of the input, which DuQuant's rotation (`methods.duquant`)
spreads. Layers of one input get operators of their own. Weights are rounded with the scale of least squared error
(`methods.mse`), of which the published five candidates are a coarse form.

Left out: a second rotation, of the outputs, which has to be undone behind the product and folds nowhere; static scales
of activations per channel, which no integer kernel can run; channels behind the last whole block, which stay.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from calibrator.quantizers.base import LayerStatistics, Needs
from calibrator.quantizers.methods.mse import through
from calibrator.quantizers.turning import InputOperator, turn_bits
from calibrator.quantizers.weights import QuantizedWeight
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format, Parameter


class SingularVectors:
    """See the module. block: channels that are turned together."""

    version = 1
    defaults: Mapping[str, Parameter] = {"block": 64}
    needs = Needs.NOTHING

    def operator_bits(self, inputs: int, parameters: Mapping[str, Parameter]) -> int:
        size = min(int(parameters["block"]), inputs)
        return turn_bits(inputs, size, inputs // size)

    def quantize(
        self, weight: Tensor, fmt: Format, parameters: Mapping[str, Parameter], statistics: LayerStatistics | None
    ) -> QuantizedWeight:
        return through(found_operator(weight.detach().flatten(1), parameters), weight, fmt)


def found_operator(weight: Tensor, parameters: Mapping[str, Parameter]) -> InputOperator:
    """The operator of a layer with the weight [out, in]. Raises ArtefactError for a block out of range."""
    block = int(parameters["block"])
    if block < 2:
        raise ArtefactError(f"quantvla: block={block}: expected at least 2")
    rows, size = weight.double().cpu(), min(block, weight.shape[1])
    order = alternating(rows.square().mean(0))
    whole = len(order) - len(order) % size
    blocks = rows[:, order[:whole]].unflatten(1, (-1, size)).transpose(0, 1)  # [blocks, out, size]
    return InputOperator.of([(order, singular_vectors(blocks))])


def alternating(energy: Tensor) -> Tensor:
    """The order [in] of channels: the largest of `energy` [in], the smallest, the second largest, and so on."""
    falling = energy.argsort(descending=True, stable=True)
    order = torch.empty_like(falling)
    half = (len(falling) + 1) // 2
    order[0::2], order[1::2] = falling[:half], falling[half:].flip(0)
    return order


def singular_vectors(blocks: Tensor) -> Tensor:
    """Of [n, out, size] the right singular vectors as columns [n, size, size], the largest value first.

    A vector's sign is free: its largest entry is positive.
    """
    vectors = torch.linalg.eigh(blocks.mT @ blocks)[1].flip(-1)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()


QUANTIZER = SingularVectors()
