"""A weight as integers: codes per weight, one scale per group of consecutive inputs or per output channel."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from calibrator.quantizers.turning import InputOperator
from vla_policy.core.errors import PolicyError
from vla_policy.core.formats import Format

WEIGHT_BITS = (2, 3, 4, 8)
_AT_ONCE = 1 << 22  # weights
_HALF = torch.finfo(torch.float16)


def code_range(bits: int) -> tuple[int, int]:
    """The smallest and the largest code, in two's complement. Raises PolicyError for a width that is not supported."""
    if bits not in WEIGHT_BITS:
        raise PolicyError(f"{bits}-bit codes are not supported; choose from {', '.join(map(str, WEIGHT_BITS))} or 16")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers.

    codes: int8 [out, in], every value within `code_range(format.weight_bits)`.
    scales: float32 [out, groups] holding float16 numbers, groups = ceil(in / group size), or 1 per output channel;
        always positive.
    shape: the weight's own shape, e.g. [out, channels, height, width] of a convolution.
    operator: what the layer's input goes through first; codes are of the weight that belongs to what comes out.
    """

    codes: Tensor
    scales: Tensor
    format: Format
    shape: tuple[int, ...]
    operator: InputOperator | None = None

    @property
    def peak(self) -> float:
        """Bound of the magnitudes that `dequantize` gives."""
        return float(self.scales.max()) * max(int(self.codes.max()), -int(self.codes.min()))

    def part(self, rows: slice) -> "QuantizedWeight":
        """Some of the outputs."""
        codes = self.codes[rows]
        return replace(self, codes=codes, scales=self.scales[rows], shape=(len(codes), *self.shape[1:]))

    def dequantize(self) -> Tensor:
        """codes * scales as float32, in the weight's own shape: what multiplies the layer's input, or what its operator
        makes of it."""
        inputs = self.codes.shape[1]
        size = self.format.group_size or inputs
        scales = self.scales.repeat_interleave(size, dim=1)[:, :inputs]
        return (self.codes.float() * scales).reshape(self.shape)

    def seen_from_outside(self) -> Tensor:
        """float64: the weight that multiplies the layer's own input, whatever operator it goes through."""
        weight = self.dequantize().double()
        return weight if self.operator is None else self.operator.back(weight.flatten(1)).reshape(self.shape)

    def to(self, device: torch.device) -> "QuantizedWeight":
        operator = self.operator and self.operator.to(device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), operator=operator)


def groups_per_row(inputs: int, fmt: Format) -> int:
    """Number of scales per output channel of a layer with `inputs` inputs; the last group may be shorter."""
    return -(-inputs // fmt.group_size) if fmt.group_size else 1


def half(steps: Tensor) -> Tensor:
    """The nearest positive float16 numbers, subnormal ones included, as float32; infinite beyond float16.

    Scales are float16 because engines store two bytes per scale: what is scored here is then exactly what runs.
    """
    return steps.clamp_min(_HALF.smallest_normal * _HALF.eps).half().float()


RoundGroups = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From float32 [rows, groups, size] to codes of the same shape and scales [rows, groups]."""


def by_groups(weight: Tensor, fmt: Format, round_groups: RoundGroups) -> QuantizedWeight:
    """A weight [out, ...] of which every group is rounded by itself; a ragged last one is filled up with zeros.

    Some rows at a time: what `round_groups` needs for them stays in the processor's cache. Raises PolicyError for a
    weight that is too large for a scale in float16.
    """
    rows = weight.detach().flatten(1)
    inputs = rows.shape[1]
    groups = groups_per_row(inputs, fmt)
    size = fmt.group_size or inputs
    codes, scales = [], []
    for part in rows.split(max(1, _AT_ONCE // inputs)):
        grouped = functional.pad(part.float(), (0, groups * size - inputs)).view(len(part), groups, size)
        found, steps = round_groups(grouped)
        codes.append(found.to(torch.int8).view(len(part), -1)[:, :inputs])
        scales.append(steps)
        if not bool(steps.isfinite().all()):
            raise PolicyError(
                f"weight of shape {list(weight.shape)} holds {float(part.abs().max()):.3g}; scales are float16, so "
                f"{fmt} holds at most {_HALF.max * code_range(fmt.weight_bits)[1]:.3g}: keep the layer at 16 bits, or "
                "check the checkpoint"
            )
    return QuantizedWeight(torch.cat(codes).contiguous(), torch.cat(scales), fmt, tuple(weight.shape))
