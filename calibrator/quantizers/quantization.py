"""Symmetric round-to-nearest quantization: the one implementation that scores, plans and packs weights.

Weights, per output channel or per group of consecutive inputs (Mix-QVLA Sec. 3.1 names no finer rule):

    scale = fp16(max|w| / top),   code = clamp(round(w / scale), low, high),   w~ = code * scale

with `top`, `low`, `high` by bits: 8 -> 127, -127..127; 4 -> 7, -7..7; 3 -> 3, -3..3; 2 -> 2, -2..1. With 2 bits the
rule of the other widths would leave three levels, the outer two at the largest weight: on Gaussian weights in groups
of 64 its mean squared error is 0.52 of the variance. All four two's-complement codes with top = 2 give 0.17, still
without any search, at the price of clipping the largest positive weight. A convolution is its equivalent linear map.
Scales are float16 numbers because engines store two bytes per scale: what is scored here is then exactly what runs.

Activations, dynamic and per token: the same rule over the last axis of the layer's input, at run time. Rounding has
no useful derivative, so its gradient is taken as 1 (straight-through); a policy's weights are constants here.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_policy.core.errors import PolicyError
from vla_policy.core.formats import Format

WEIGHT_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Levels:
    """Integer codes `low`..`high`, and the code `top` that the largest magnitude is scaled to."""

    low: int
    high: int
    top: int


def levels(bits: int) -> Levels:
    """The codes of a bit-width. Raises PolicyError for a width that no engine here can hold."""
    if bits not in WEIGHT_BITS:
        raise PolicyError(f"{bits}-bit codes are not supported; choose from {', '.join(map(str, WEIGHT_BITS))} or 16")
    if bits == 2:
        return Levels(-2, 1, 2)
    top = 2 ** (bits - 1) - 1
    return Levels(-top, top, top)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers.

    codes: int8 [out, in], every value within `levels(format.weight_bits)`.
    scales: float32 [out, groups] holding float16 numbers, groups = ceil(in / group size), or 1 per output channel;
        always positive.
    shape: the weight's own shape, e.g. [out, channels, height, width] of a convolution.
    """

    codes: Tensor
    scales: Tensor
    format: Format
    shape: tuple[int, ...]

    @property
    def peak(self) -> float:
        """Bound of the magnitudes that `dequantize` gives."""
        return float(self.scales.max()) * levels(self.format.weight_bits).top

    def dequantize(self) -> Tensor:
        """codes * scales as float32, in the weight's own shape."""
        inputs = self.codes.shape[1]
        size = self.format.group_size or inputs
        scales = self.scales.repeat_interleave(size, dim=1)[:, :inputs]
        return (self.codes.float() * scales).reshape(self.shape)


def groups_per_row(inputs: int, fmt: Format) -> int:
    """Number of scales per output channel of a layer with `inputs` inputs; the last group may be shorter."""
    return -(-inputs // fmt.group_size) if fmt.group_size else 1


def quantize_weight(weight: Tensor, fmt: Format) -> QuantizedWeight:
    """Round-to-nearest codes and scales of `weight` [out, ...]; see the module's rule.

    A group of zeros gets scale 1. Raises PolicyError for an unsupported bit-width, a weight that is not finite, and one
    that is too large for a scale in float16.
    """
    limits = levels(fmt.weight_bits)
    rows = weight.detach().float().flatten(1)
    if not bool(rows.isfinite().all()):
        shape = list(weight.shape)
        raise PolicyError(f"weight of shape {shape} is not finite; the checkpoint is damaged: copy it again")
    outputs, inputs = rows.shape
    groups = groups_per_row(inputs, fmt)
    size = fmt.group_size or inputs
    grouped = functional.pad(rows, (0, groups * size - inputs)).view(outputs, groups, size)
    peak = grouped.abs().amax(-1)
    half = torch.finfo(torch.float16)
    steps = (peak / limits.top).clamp_min(half.smallest_normal).half().float()
    if not bool(steps.isfinite().all()):
        raise PolicyError(
            f"weight of shape {list(weight.shape)} holds {float(peak.max()):.3g}; scales are float16, so {fmt} holds "
            f"at most {half.max * limits.top:.3g}: keep the layer at 16 bits, or check the checkpoint"
        )
    scales = torch.where(peak > 0, steps, torch.ones_like(peak))
    codes = (grouped / scales[..., None]).round_().clamp_(limits.low, limits.high).to(torch.int8)
    return QuantizedWeight(codes.view(outputs, -1)[:, :inputs].contiguous(), scales, fmt, tuple(weight.shape))


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


def _quantize_patches(x: Tensor, conv: nn.Conv2d, bits: int) -> Tensor:
    """`quantize_activation` where a token is one patch of a convolution whose patches do not overlap."""
    height, width = conv.kernel_size
    batch, channels, rows, columns = x.shape
    patches = x.view(batch, channels, rows // height, height, columns // width, width).permute(0, 2, 4, 1, 3, 5)
    tokens = quantize_activation(patches.flatten(3), bits).view(patches.shape)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def quantize_input(module: nn.Module, x: Tensor, bits: int) -> Tensor:
    """A layer's input as its engine sees it: per token for a linear layer, per patch for a patch convolution."""
    if not isinstance(module, nn.Conv2d):
        return quantize_activation(x, bits)
    if module.kernel_size != module.stride or module.padding not in ((0, 0), 0):
        raise PolicyError(f"{module}: activations of a convolution with overlapping patches are not supported")
    return _quantize_patches(x, module, bits)


def find_layer(policy: nn.Module, unit: str) -> nn.Linear | nn.Conv2d:
    """The linear or convolution layer called `unit`. Raises PolicyError naming what is there instead."""
    try:
        module = policy.get_submodule(unit)
    except AttributeError as error:
        raise PolicyError(f"policy has no layer {unit!r}; the plan belongs to another policy") from error
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise PolicyError(f"{unit!r} is a {type(module).__name__}; only linear and convolution layers are quantized")
    return module


def _rounded(unit: str, weight: Tensor, fmt: Format) -> Tensor:
    """The weight of the layer `unit` as its codes stand for it, in its own dtype. Raises PolicyError naming `unit`."""
    try:
        return quantize_weight(weight, fmt).dequantize().to(weight.dtype)
    except PolicyError as error:
        raise PolicyError(f"{unit}: {error}") from error


def _round_input(module: nn.Module, bits: int) -> torch.utils.hooks.RemovableHandle:
    return module.register_forward_pre_hook(lambda layer, args: (quantize_input(layer, args[0], bits), *args[1:]))


@contextmanager
def quantized(policy: nn.Module, unit: str, fmt: Format) -> Iterator[None]:
    """Runs the block with one layer in `fmt` and everything else as it was; restored bit for bit, even on errors.

    Weights of 16 bits are left alone, and so are activations of 16 bits.
    """
    module = find_layer(policy, unit)
    original = module.weight.data
    handle = None
    try:
        if fmt.weight_bits < 16:
            module.weight.data = _rounded(unit, original, fmt)
        if fmt.activation_bits < 16:
            handle = _round_input(module, fmt.activation_bits)
        yield
    finally:
        module.weight.data = original
        if handle is not None:
            handle.remove()


@contextmanager
def quantized_units(policy: nn.Module, assignment: Mapping[str, Format]) -> Iterator[None]:
    """Runs the block with several layers quantized; see `quantized`."""
    with ExitStack() as stack:
        for unit, fmt in assignment.items():
            stack.enter_context(quantized(policy, unit, fmt))
        yield


def quantize_policy(policy: nn.Module, assignment: Mapping[str, Format]) -> None:
    """Quantizes the named layers for good, in place; the simulated twin of the engine that the plan gives."""
    for unit, fmt in assignment.items():
        module = find_layer(policy, unit)
        if fmt.weight_bits < 16:
            module.weight.data = _rounded(unit, module.weight.data, fmt)
        if fmt.activation_bits < 16:
            _round_input(module, fmt.activation_bits)
