"""Activations as engines round them while they run, from the largest magnitude of a token or of a group of its inputs.

Per token, and per token and group, differ in more than the number of scales: ONNX Runtime's kernels, which round per
group, multiply by top / peak where the others divide by peak / top. So a value near the middle of two codes may get the
other one, and both are written here as they are there.

Rounding has no useful derivative, so its gradient is taken as 1 (straight-through).
"""

import torch
from torch import Tensor, nn

from calibrator.quantizers.methods.rtn import levels
from vla_policy.core.errors import PolicyError
from vla_policy.core.formats import FULL_PRECISION, Format, Rounding


def quantize_activation(x: Tensor, bits: int, group: int | None = None) -> Tensor:
    """`x` [..., features] rounded per token (last axis) with a dynamic scale; same shape and dtype.

    group: consecutive features that share a scale, the last of which may be fewer; None: all of a token.

    The gradient with respect to `x` passes unchanged (straight-through estimator).
    """
    values = x.detach().float()
    rounded = _per_token(values, bits) if group is None else _per_group(values, bits, group)
    return x + (rounded.to(x.dtype) - x).detach()


def _per_token(values: Tensor, bits: int) -> Tensor:
    limits = levels(bits)
    peak = values.abs().amax(-1, keepdim=True)
    scale = torch.where(peak > 0, peak / limits.top, torch.ones_like(peak))
    return (values / scale).round_().clamp_(limits.low, limits.high).mul_(scale)


def _per_group(values: Tensor, bits: int, group: int) -> Tensor:
    """As MLAS does in its block-quantized products with int8 activations: float32 throughout, ties to even."""
    limits, features = levels(bits), values.shape[-1]
    grouped = nn.functional.pad(values, (0, -features % group)).unflatten(-1, (-1, group))
    peak = grouped.abs().amax(-1, keepdim=True)
    top = torch.full_like(peak, limits.top)  # torch makes a number over a tensor a product with the reciprocal
    inverse = torch.where(peak > 0, top / peak, torch.zeros_like(peak))
    codes = (grouped * inverse).round_().clamp_(limits.low, limits.high)
    return (codes * (peak / limits.top)).flatten(-2)[..., :features]


def quantize_input(module: nn.Module, x: Tensor, fmt: Format, rounding: Rounding = Rounding.TOKEN) -> Tensor:
    """A layer's input as its engine sees it: per token for a linear layer, per patch for a patch convolution.

    rounding: which values share a scale; a fixed one is taken as one per token.
    """
    if fmt.activation_bits >= FULL_PRECISION.activation_bits:
        return x
    group = fmt.group_size if rounding is Rounding.GROUP else None
    if not isinstance(module, nn.Conv2d):
        return quantize_activation(x, fmt.activation_bits, group)
    patches = _patches(module, x)
    tokens = quantize_activation(patches.flatten(3), fmt.activation_bits, group).view(patches.shape)
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
