"""Input operators: what a layer's input goes through before it is rounded and multiplied.

An operator is a few turns, each a permutation of the channels and a product with small matrices in blocks,

    x' = x[order] diag(R_1, ..., R_n),      W' = W[order] diag(R_1^-T, ..., R_n^-T)

so that x' W'^T = x W^T for any R that has an inverse: the layer computes what it did, and outliers that were in one
channel are spread over a block. R is orthogonal but for its rounding to float16, in which engines hold it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """order: int64 [in], the channel that comes to each place. blocks: float32 [n, size, size] holding float16 numbers,
    one for all blocks of `size` consecutive channels, or each block its own; channels behind the last whole block stay.
    """

    order: Tensor
    blocks: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """x' of x [..., in], in its own type."""
        return _in_blocks(x[..., self.order], self.blocks.to(x))

    def weight(self, rows: Tensor) -> Tensor:
        """W' of W [out, in]."""
        inverse = torch.linalg.inv(self.blocks.double()).mT
        return _in_blocks(rows[:, self.order], inverse.to(rows))

    def back(self, x: Tensor) -> Tensor:
        """What the transposed operator gives of [..., in]: a gradient with respect to x of one with respect to x'."""
        result = torch.empty_like(x)
        result[..., self.order] = _in_blocks(x, self.blocks.mT.to(x))
        return result

    def to(self, device: torch.device) -> "Turn":
        return Turn(self.order.to(device), self.blocks.to(device))


@dataclass(frozen=True)
class InputOperator:
    """Turns one after another."""

    turns: tuple[Turn, ...]

    @staticmethod
    def of(steps: Sequence[tuple[Tensor, Tensor]]) -> "InputOperator":
        """From orders and matrices [n, size, size], which are rounded to float16."""
        return InputOperator(tuple(Turn(order.long(), blocks.half().float()) for order, blocks in steps))

    def apply(self, x: Tensor) -> Tensor:
        """What is multiplied in the place of x [..., in]."""
        for turn in self.turns:
            x = turn.apply(x)
        return x

    def weight(self, rows: Tensor) -> Tensor:
        """What multiplies it in the place of a weight [out, in]; float64 keeps its digits."""
        for turn in self.turns:
            rows = turn.weight(rows)
        return rows

    def back(self, x: Tensor) -> Tensor:
        """The transposed operator."""
        for turn in reversed(self.turns):
            x = turn.back(x)
        return x

    def to(self, device: torch.device) -> "InputOperator":
        return InputOperator(tuple(turn.to(device) for turn in self.turns))


def turn_bits(inputs: int, size: int, matrices: int) -> int:
    """What engines hold of one turn: an order in int32, matrices in float16."""
    return 32 * inputs + 16 * matrices * size**2


def _in_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x [..., in] times the block-diagonal matrix of `blocks` [n, size, size]."""
    size = blocks.shape[-1]
    whole = x.shape[-1] - x.shape[-1] % size
    parts = x[..., :whole].unflatten(-1, (-1, size))
    turned = (parts @ blocks[0] if len(blocks) == 1 else torch.einsum("...ns,nst->...nt", parts, blocks)).flatten(-2)
    return torch.cat([turned, x[..., whole:]], dim=-1) if whole < x.shape[-1] else turned
