"""What a layer can be: a number format, and how its codes are found. A plan assigns it and an engine realises it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vla_policy.core.errors import ArtefactError

_NAME = re.compile(r"w(\d+)a(\d+)(?:_g(\d+))?")
Parameter = bool | int | float


@dataclass(frozen=True)
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

    @property
    def precision(self) -> tuple[int, int, float]:
        """Sorts formats: by bits of weights, then of activations, then from large groups to small."""
        return self.weight_bits, self.activation_bits, -(self.group_size or math.inf)

    def is_at_least(self, other: "Format") -> bool:
        """Whether it is as precise as `other` on every count."""
        return all(mine >= its for mine, its in zip(self.precision, other.precision, strict=True))


FULL_PRECISION = Format(16, 16)


class Rounding(Enum):
    """Which values of an input below 16 bits share a scale; a matter of the kernel, not of the format's name.

    TOKEN, GROUP: found while the engine runs, from the largest magnitude of a token, or of its part that one group of
    the weights multiplies. TENSOR: fixed when it is built, from the states of a calibration set.
    """

    TOKEN = "per token"
    GROUP = "per token and group"
    TENSOR = "per tensor, fixed"


@dataclass(frozen=True)
class Recipe:
    """How the codes of a weight are found: a method of `calibrator.quantizers`.

    version: of the method; a table, plan or engine made by another version is another one's. parameters: those that
    differ from the method's defaults, by name.
    """

    method: str
    version: int
    parameters: tuple[tuple[str, Parameter], ...] = ()

    def __str__(self) -> str:
        inside = ",".join(f"{name}={json.dumps(value)}" for name, value in self.parameters)
        return f"{self.method}({inside})" if inside else self.method

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "version": self.version, "parameters": dict(self.parameters)}

    @staticmethod
    def from_json(raw: Mapping[str, Any] | None) -> "Recipe | None":
        """Raises KeyError, TypeError or AttributeError for an entry that is none."""
        if raw is None:
            return None
        return Recipe(raw["method"], raw["version"], tuple(sorted(raw["parameters"].items())))


@dataclass(frozen=True)
class Choice:
    """What one layer can be; recipe: None exactly where weights keep 16 bits.

    Its text, e.g. `w16a16`, `w4a16_g64:rtn` or `w3a16_g64:mse(steps=40)`, is a key in tables and a word on command
    lines; `calibrator.quantizers` parses it, for the methods are there.
    """

    format: Format
    recipe: Recipe | None

    def __post_init__(self) -> None:
        if (self.recipe is None) != (self.format.weight_bits >= FULL_PRECISION.weight_bits):
            raise ArtefactError(f"choice {self}: a recipe belongs to weights below 16 bits, and only to them")

    def __str__(self) -> str:
        return str(self.format) if self.recipe is None else f"{self.format}:{self.recipe}"

    @property
    def precision(self) -> tuple[tuple[int, int, float], str]:
        """Sorts choices: by format, then by recipe."""
        return self.format.precision, str(self.recipe or "")

    def to_json(self) -> dict[str, Any]:
        return {"format": str(self.format), "recipe": self.recipe and self.recipe.to_json()}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> "Choice":
        """Raises as `Recipe.from_json` for an entry that is none, ArtefactError for a format that is none."""
        return Choice(Format.parse(raw["format"]), Recipe.from_json(raw["recipe"]))


FULL = Choice(FULL_PRECISION, None)
