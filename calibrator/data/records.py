"""What every kind of source gives: trajectories to choose from, and the chosen records. Independent of any policy."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vla_policy.core.left_out import LeftOut
from vla_policy.core.observation import Observation


@dataclass(frozen=True)
class Trajectory:
    """One episode of a source. `length`: its number of states T; `steps`: those that can be used, ascending."""

    name: str
    length: int
    steps: Sequence[int]


@dataclass(frozen=True)
class SourceIndex:
    """What a source holds: its trajectories, everything that cannot be used, and what else the user should know."""

    trajectories: tuple[Trajectory, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """One state of a source. action: float32 [K], what was recorded as carried out from here; None where it is not."""

    trajectory: str
    step: int
    observation: Observation
    action: np.ndarray | None = None


class Source(Protocol):
    """Somewhere states come from: a bag, a data set, a file of demonstrations."""

    path: str

    def index(self) -> SourceIndex:
        """Trajectories and what is unusable, without decoding more pictures than finding that out takes."""
        ...

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[Record]:
        """The records of the steps wanted by trajectory name. Call `index` first."""
        ...

    def describe(self) -> dict[str, Any]:
        """Kind, path, hash and layout, for the artefact. Call `index` first."""
        ...
