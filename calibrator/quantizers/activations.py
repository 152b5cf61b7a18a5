"""Activations as engines round them: by the largest magnitude of a token or of a group of its inputs while they run, or
by that of a calibration set.

Per token, and per token and group, differ in more than the number of scales: ONNX Runtime's kernels, which round per
group, multiply by top / peak where the others divide by peak / top. So a value near the middle of two codes may get the
other one, and all are written here as they are there. A fixed scale is a number that is stored in the engine, in
float16; beyond it values are clipped, and all codes of two's complement are used.

Rounding has no useful derivative, so its gradient is taken as 1 (straight-through).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from calibrator.quantizers.methods.rtn import levels
from calibrator.quantizers.turning import InputOperator
from calibrator.quantizers.weights import code_range, half
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.formats import FULL_PRECISION, Format, Rounding
from vla_policy.core.targets import Target


@dataclass(frozen=True)
class InputScale:
    """Which values of a layer's input share a scale. step: the scale itself where it is fixed."""

    rounding: Rounding = Rounding.TOKEN
    step: float | None = None


PER_TOKEN = InputScale()


@dataclass(frozen=True)
class InputScales:
    """How a machine rounds the inputs of a policy's layers.

    target: the machine; None rounds per token. peaks: largest |input| over a calibration set, by layer; of all that get
    a fixed scale.
    """

    target: Target | None = None
    peaks: Mapping[str, float] = field(default_factory=dict)

    def of(self, unit: str, fmt: Format) -> InputScale:
        """Of one layer. Raises ArtefactError for a fixed scale that does not follow from `peaks`."""
        rounding = self.target.rounding(fmt) if self.target else None
        if self.target is None or rounding is not Rounding.TENSOR:
            return InputScale(rounding or Rounding.TOKEN)
        peak = self.peaks.get(unit)
        if peak is None:
            raise ArtefactError(
                f"{unit} in {fmt}: {self.target.name} rounds its input with one fixed scale, and its largest value is "
                "not known; measure and allocate again with --target, or build with --calibration"
            )
        return InputScale(rounding, fixed_step(unit, peak, fmt))


def fixed_step(unit: str, peak: float, fmt: Format) -> float:
    """The fixed scale of a layer's inputs up to `peak`, a positive float16 number. Raises ArtefactError where there is
    none."""
    step = float(half(torch.tensor(peak / levels(fmt.activation_bits).top)))
    if not (peak > 0 and step < float("inf")):
        raise ArtefactError(f"{unit} in {fmt}: inputs up to {peak:g} have no scale in float16; collect other states")
    return step


def quantize_activation(x: Tensor, bits: int, group: int | None = None) -> Tensor:
    """`x` [..., features] rounded per token (last axis) with a dynamic scale; same shape and dtype.

    group: consecutive features that share a scale, the last of which may be fewer; None: all of a token.

    The gradient with respect to `x` passes unchanged (straight-through estimator).
    """
    values = x.detach().float()
    return _passing(x, _per_token(values, bits) if group is None else _per_group(values, bits, group))


def _passing(x: Tensor, rounded: Tensor) -> Tensor:
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


def _fixed(values: Tensor, bits: int, step: float) -> Tensor:
    """As ONNX's QuantizeLinear and DequantizeLinear, of which TensorRT makes an INT8 product."""
    steps = torch.full_like(values[..., :1], step)  # a number would become its reciprocal
    return (values / steps).round_().clamp_(*code_range(bits)).mul_(steps)


def quantize_input(
    module: nn.Module,
    x: Tensor,
    fmt: Format,
    scale: InputScale = PER_TOKEN,
    operator: InputOperator | None = None,
) -> Tensor:
    """A layer's input as its engine multiplies it: gone through an operator, then rounded per token of a linear layer,
    per patch of a patch convolution, or by a fixed scale.

    Raises ArtefactError for an operator and a fixed scale, which is of the input as it comes.
    """
    if operator is None and fmt.activation_bits >= FULL_PRECISION.activation_bits:
        return x
    if operator is not None and scale.step is not None:
        raise ArtefactError(f"{fmt}: its fixed scale is of inputs as they come, not of turned ones; use another format")
    if not isinstance(module, nn.Conv2d):
        return _tokens(x, fmt, scale, operator)
    patches = _patches(module, x)
    tokens = _tokens(patches.flatten(3), fmt, scale, operator).view(patches.shape)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def _tokens(x: Tensor, fmt: Format, scale: InputScale, operator: InputOperator | None) -> Tensor:
    """Of [..., in]."""
    bits = fmt.activation_bits
    turned = x if operator is None else operator.apply(x)
    if bits >= FULL_PRECISION.activation_bits:
        return turned
    if scale.step is not None:
        return _passing(turned, _fixed(turned.detach().float(), bits, scale.step))
    return quantize_activation(turned, bits, fmt.group_size if scale.rounding is Rounding.GROUP else None)


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
