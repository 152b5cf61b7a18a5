"""Choices by round-to-nearest, as most tests want them."""

from torch import Tensor

from calibrator.quantizers import QuantizedWeight, parse_choice, parse_choices, quantize
from calibrator.quantizers.weights import code_range
from vla_policy.core.formats import FULL_PRECISION, Choice, Format

CHOICES = parse_choices(("w2a16_g32:rtn", "w4a16_g32:rtn", "w8a16_g32:rtn"))
W2, W4, W8 = CHOICES
WITH_ACTIVATIONS = parse_choices(("w2a2_g32:rtn", "w4a4_g32:rtn", "w8a8_g32:rtn"))


def rtn(fmt: Format) -> Choice:
    return parse_choice(str(fmt) if fmt.weight_bits >= FULL_PRECISION.weight_bits else f"{fmt}:rtn")


def with_every_code(weight: Tensor, fmt: Format) -> QuantizedWeight:
    """A quantized weight in which the outermost codes occur that some method may use."""
    result = quantize(weight, rtn(fmt))
    low, high = code_range(fmt.weight_bits)
    result.codes[:, 0], result.codes[:, 1] = low, high
    return result
