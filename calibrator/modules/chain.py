"""A policy as a chain of segments: what runs after what, and which layers run where.

A segment computes one value from values before it; the policy's inputs are the first values. Whatever measures a policy
walks its chain, so that it knows neither how a family is put together nor how its tensors are called.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Stage = Literal["vision", "projector", "language", "head"]
DECIDED = "decided"
"""The value that holds the decision which a pass is held to."""
PROMPT = "input_ids"
"""The input that holds the prompt's token ids, [B, L], of a policy that reads one."""
PAD = -1
"""What fills up shorter prompts of a batch at their right end, where the policy allows it."""


@dataclass(frozen=True)
class Runs:
    """`times` runs of a layer with `tokens` rows each; a mean over states need not be whole."""

    tokens: float
    times: int = 1


@dataclass(frozen=True)
class Layers:
    """The linear and convolution layers of a segment: all that lie under the policy's submodule `path`.

    label: what people read in place of `path`. track: the part of the stage, as charts name it. runs: of each layer for
    one decision, from the number of prompt tokens and of decided values. fused: layers, by their path from `path`,
    that engines fuse because they have the same input, and what the fused layer is called; they share a format.
    after_norms: norms by their path, and the linear layers that read their output, which nothing else does.
    after_layers: the same of linear layers, where every output channel reaches the same channel of what reads it, by
    sums and products alone. rows: the outputs that a decision reads; the others are in no engine. None for all. kept:
    whether plans keep them at 16 bits unless a pin names another choice.
    """

    path: str
    label: str
    stage: Stage
    track: str
    runs: Callable[[float, int], tuple[Runs, ...]]
    fused: Mapping[str, str] = field(default_factory=dict)
    after_norms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    after_layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: range | None = None
    kept: bool = False


@dataclass(frozen=True)
class Segment:
    """One step: `run` makes the value `name` from the values `reads`, in their order."""

    name: str
    reads: tuple[str, ...]
    run: Callable[..., Tensor]
    layers: tuple[Layers, ...] = ()

    def add_to(self, values: dict[str, Tensor]) -> None:
        """Computes the segment's value from those that are there."""
        values[self.name] = self.run(*(values[name] for name in self.reads))


@dataclass(frozen=True)
class Chain:
    """All segments of a policy, in the order in which they run.

    preamble: segments up to the first boundary, and those that no boundary lies before; no gradient passes them.
    trunk: from the first boundary on; the last segment's value is the policy's output. boundaries: the values at which
    evidence is measured, by the names of `calibrator.sensitivity.evidence.BOUNDARIES`. language_block: number of the
    block whose input the language boundary is. image_grid: rows and columns of the vision boundary's tokens on the
    image, of several images one above the other.
    """

    preamble: tuple[Segment, ...]
    trunk: tuple[Segment, ...]
    boundaries: Mapping[str, str]
    language_block: int
    image_grid: tuple[int, int]

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.preamble + self.trunk

    @property
    def output(self) -> str:
        """The value that is the policy's output."""
        return self.trunk[-1].name

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole pass from the inputs, and with them `DECIDED`: all values by name."""
        return run_segments(self.segments, values)


def run_segments(segments: Iterable[Segment], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`values`, and those of the segments."""
    known = dict(values)
    for segment in segments:
        segment.add_to(known)
    return known
