"""What a backend gives a robot, and the rules that say which number formats it runs."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format, Rounding
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import Session

LayerKind = Literal["linear", "encoder", "patch_embed", "head"]
"""Linear layers of the language model, of what encodes its inputs (vision, projectors), the patches', and the head."""
_ALL_KINDS: tuple[LayerKind, ...] = ("linear", "encoder", "patch_embed", "head")
ROW: None = None
"""In a rule's groups: one scale per output channel."""

MEMORY_ONLY = "saves memory, not time"
"""Ends the name of a kernel whose formats are smaller than 16 bits and no faster."""

Version = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One format that a backend runs: by which kernel, for which group sizes and layer kinds.

    rounding: of activations below 16 bits.
    """

    weight_bits: int
    activation_bits: int
    groups: tuple[int | None, ...]
    kernel: str
    kinds: tuple[LayerKind, ...] = _ALL_KINDS
    rounding: Rounding = Rounding.TOKEN

    def formats(self) -> tuple[Format, ...]:
        return tuple(Format(self.weight_bits, self.activation_bits, group) for group in self.groups)


@dataclass(frozen=True)
class Workload:
    """What a plan asks of a backend: formats, number of weights, and whether output channels of a layer differ."""

    formats: frozenset[Format]
    weights: int
    splits_layers: bool = False


class Backend(Protocol):
    """What runs engines; its folder exports it as `BACKEND`.

    fuses_groups: whether layers of one input (q/k/v, gate/up) become one kernel and must share a format.
    splits_layers: whether output channels of one layer may have several widths, each a product of its own.
    """

    @property
    def name(self) -> str: ...

    @property
    def fuses_groups(self) -> bool: ...

    @property
    def splits_layers(self) -> bool: ...

    def rules(self, version: Version) -> tuple[Rule, ...]:
        """The formats that this version runs. A rule names a kernel that exists, not a wish."""
        ...

    def refused(self, version: Version) -> tuple[tuple[str, str], ...]:
        """Formats, without group, that people ask for and this version lacks, with the reason."""
        ...

    def why_faster_here(self, workload: Workload) -> str | None:
        """Why `build` takes it, unasked, instead of a target's first backend; None where it does not.

        That is where this machine can run it and it has been seen to be the faster one. None for what only runs when it
        is named.
        """
        ...

    def files_named_in(self, graph: Path) -> set[str]:
        """The further files that are read when a graph's file is opened. Raises ArtefactError if it is damaged."""
        ...

    def open_session(self, folder: Path, manifest: Manifest, threads: int | None) -> Session:
        """The engine in `folder`, ready to run. threads: of the CPU; None leaves the number to the backend.

        Raises ArtefactError for an engine of another version or machine, and for what is not installed.
        """
        ...


def parse_version(text: str) -> Version:
    """The leading numbers of e.g. `10.13.0` or `1.31.1+cpu`."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", text)[0]))


def check_version(folder: Path, manifest: Manifest, package: str, installed: str) -> None:
    """Raises ArtefactError unless major and minor version are those with which the engine's formats were proven."""
    if manifest.backend_version.split(".")[:2] != installed.split(".")[:2]:
        raise ArtefactError(
            f"{folder}: formats were proven with {package} {manifest.backend_version}, installed is {installed}; "
            f"install that version, or build for this one: engine_build build --target {manifest.target} --backend "
            f"{manifest.backend} --policy POLICY --plan PLAN --out {folder}"
        )
