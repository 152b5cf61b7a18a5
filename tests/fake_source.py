"""A source of calibration states that needs no file."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tiny import INSTRUCTIONS

from calibrator.data.records import Record, SourceIndex, Trajectory
from vla_policy.core.observation import Observation


class FakeSource:
    """Trajectories of random images and states, reproducible by name and step."""

    def __init__(self, lengths: tuple[int, ...], state_dim: int | None = 2, seed: int = 0, images: int = 1) -> None:
        self.path = "fake"
        self._lengths = {f"episode_{index}": length for index, length in enumerate(lengths)}
        self._state_dim = state_dim
        self._seed = seed
        self._images = images

    def index(self) -> SourceIndex:
        found = [Trajectory(name, length, tuple(range(length))) for name, length in self._lengths.items()]
        return SourceIndex(tuple(found), ())

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[Record]:
        for name, steps in wanted.items():
            number = int(name.split("_")[1])
            for step in sorted(steps):
                generator = np.random.default_rng([self._seed, number, step])
                image, *further = generator.integers(0, 256, (self._images, 32, 32, 3), dtype=np.uint8)
                state = None if self._state_dim is None else generator.uniform(0, 0.1, self._state_dim)
                task = INSTRUCTIONS[number % len(INSTRUCTIONS)]
                yield Record(name, step, Observation(image, task, state, tuple(further)))

    def describe(self) -> dict[str, Any]:
        return {"kind": "fake", "path": self.path}
