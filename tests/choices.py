"""Choices by round-to-nearest, as most tests want them."""

from calibrator.quantizers import parse_choice, parse_choices
from vla_policy.core.formats import Choice, Format

CHOICES = parse_choices(("w2a16_g32", "w4a16_g32", "w8a16_g32"))
W2, W4, W8 = CHOICES
WITH_ACTIVATIONS = parse_choices(("w2a2_g32", "w4a4_g32", "w8a8_g32"))


def rtn(fmt: Format) -> Choice:
    return parse_choice(str(fmt))
