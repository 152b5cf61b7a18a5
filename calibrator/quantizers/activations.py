"""Activations as engines round them: dynamically, per token, by the rule of `methods.rtn` over a layer's input.

Rounding has no useful derivative, so its gradient is taken as 1 (straight-through).
"""

import torch
from torch import Tensor, nn

from calibrator.quantizers.methods.rtn import levels
from vla_policy.core.errors import PolicyError


def quantize_activation(x: Tensor, bits: int) -> Tensor:
    """`x` [..., features] rounded per token (last axis) with a dynamic scale; same shape and dtype.

    The gradient with respect to `x` passes unchanged (straight-through estimator).
    """
    limits = levels(bits)
    values = x.detach().float()
    peak = values.abs().amax(-1, keepdim=True)
    scale = torch.where(peak > 0, peak / limits.top, torch.ones_like(peak))
    rounded = ((values / scale).round_().clamp_(limits.low, limits.high) * scale).to(x.dtype)
    return x + (rounded - x).detach()


def quantize_input(module: nn.Module, x: Tensor, bits: int) -> Tensor:
    """A layer's input as its engine sees it: per token for a linear layer, per patch for a patch convolution."""
    if not isinstance(module, nn.Conv2d):
        return quantize_activation(x, bits)
    patches = _patches(module, x)
    tokens = quantize_activation(patches.flatten(3), bits).view(patches.shape)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as rows [tokens, in] of the matrix product that it is."""
    return (_patches(module, x).flatten(3) if isinstance(module, nn.Conv2d) else x).flatten(0, -2)


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """[B, rows, columns, channels, height, width] of patches that do not overlap. Raises PolicyError where they do."""
    height, width = conv.kernel_size
    if conv.kernel_size != conv.stride or conv.padding not in ((0, 0), 0):
        raise PolicyError(f"{conv}: inputs of a convolution with overlapping patches are not supported")
    batch, channels, rows, columns = x.shape
    grid = x.view(batch, channels, rows // height, height, columns // width, width)
    return grid.permute(0, 2, 4, 1, 3, 5)
