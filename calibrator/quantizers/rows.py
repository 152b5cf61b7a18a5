"""Layers whose output channels have several widths: the rows of one width are a matrix of their own, a part.

Plans, stores of codes and engines name such a part `layer.rows4` and treat it as they treat a layer, with a choice and
bytes of its own; the layer itself is then in none of them. Rows of 0 bits are in no part: they are absent, and what the
layer gives there is its bias. Which width a row has stands in a file of its own, beside the plan, in the store, in the
engine.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from calibrator.tensors import save_tensors
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file
from vla_policy.core.formats import FULL_PRECISION, Choice
from vla_policy.core.outputs import atomic_path

ROWS = "rows.safetensors"
KIND = "rows"


@dataclass(frozen=True)
class Part:
    """The rows of a layer that have one width. rows: int64, in the layer's order."""

    layer: str
    bits: int
    rows: Tensor

    @property
    def name(self) -> str:
        return f"{self.layer}.rows{self.bits}"


@dataclass(frozen=True)
class RowBits:
    """Which width every output channel of the split layers has. bits: uint8 [out] by layer, 0 for absent rows."""

    bits: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.bits)

    @cached_property
    def parts(self) -> dict[str, Part]:
        """By name; of a layer the widest first."""
        return {part.name: part for layer in self.bits for part in self.of(layer)}

    def of(self, layer: str) -> list[Part]:
        """A layer's parts, the widest first; none of a layer that is whole."""
        if layer not in self.bits:
            return []
        bits = self.bits[layer]
        widths = [int(width) for width in np.unique(bits)[::-1] if width]
        return [Part(layer, width, torch.from_numpy(np.flatnonzero(bits == width))) for width in widths]

    def units(self, layers: Iterable[str]) -> list[str]:
        """What has a choice of its own: the layers in their order, split ones by their parts."""
        return [name for layer in layers for name in self._names(layer)]

    def _names(self, layer: str) -> list[str]:
        return [part.name for part in self.of(layer)] if layer in self.bits else [layer]

    def check(self, choices: Mapping[str, Choice], where: Path | str) -> None:
        """Raises ArtefactError for a part with a choice of other bits than its rows', or with rounded activations."""
        for name, part in self.parts.items():
            fmt = choices[name].format
            if (fmt.weight_bits, fmt.activation_bits) != (part.bits, FULL_PRECISION.activation_bits):
                raise ArtefactError(
                    f"{where}: {name} is planned as {fmt}; its rows have {part.bits} bits, and activations of layers "
                    "with several widths have 16: allocate again"
                )

    def save(self, path: Path) -> str:
        """Writes the file, whole or not at all; returns its sha256."""
        with atomic_path(path, KIND) as temporary:
            save_tensors(temporary, self.bits, KIND)
        return sha256_file(path)

    @staticmethod
    def load(path: Path, sha256: str) -> "RowBits":
        """Raises ArtefactError for a file that is missing, damaged or not the one of this hash."""
        if sha256_file(path) != sha256:
            raise ArtefactError(f"{path}: not the file that was written with what names it; allocate again")
        try:
            found = load_file(path)
        except SafetensorError as error:
            raise ArtefactError(f"{path}: damaged or truncated ({error}); allocate again") from error
        if wrong := [layer for layer, bits in found.items() if bits.ndim != 1 or bits.dtype != np.uint8]:
            raise ArtefactError(f"{path}: {wrong[0]}: expected one uint8 per output channel; allocate again")
        return RowBits(found)


WHOLE = RowBits()
"""Every layer in one piece."""
