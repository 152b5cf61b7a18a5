"""Names of number formats: what a plan assigns and an engine realises."""

import re
from dataclasses import dataclass

from vla_policy.core.errors import ArtefactError

_NAME = re.compile(r"w(\d+)a(\d+)(?:_g(\d+))?")


@dataclass(frozen=True, order=True)
class Format:
    """Bits of weights and activations; weight scales per group of `group_size` inputs, or per output channel."""

    weight_bits: int
    activation_bits: int = 16
    group_size: int | None = None

    def __str__(self) -> str:
        group = f"_g{self.group_size}" if self.group_size else ""
        return f"w{self.weight_bits}a{self.activation_bits}{group}"

    @staticmethod
    def parse(name: str) -> "Format":
        """The format called e.g. `w4a16_g64` or `w8a8`. Raises ArtefactError for any other text."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ArtefactError(f"format {name!r} is unknown; expected e.g. w4a16_g64, w8a8 or w16a16")
        bits, activation_bits, group = match.groups()
        return Format(int(bits), int(activation_bits), int(group) if group else None)


FULL_PRECISION = Format(16, 16)
