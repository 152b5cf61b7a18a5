"""A tiny random policy and a calibration set for it, shared by the calibrator's tests."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import INSTRUCTIONS, tiny_policy_folder

from calibrator.calibration import SourceIndex, Trajectory, collect
from calibrator.sweep import Sweep, SweepSettings, SweepSpec
from vla_policy.core.observation import Observation


class FakeSource:
    """Trajectories of random images and states, reproducible by name and step."""

    def __init__(self, lengths: tuple[int, ...], state_dim: int | None = 2, seed: int = 0) -> None:
        self.path = "fake"
        self._lengths = {f"episode_{index}": length for index, length in enumerate(lengths)}
        self._state_dim = state_dim
        self._seed = seed

    def index(self) -> SourceIndex:
        found = [Trajectory(name, length, tuple(range(length))) for name, length in self._lengths.items()]
        return SourceIndex(tuple(found), {})

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[tuple[str, int, Observation]]:
        for name, steps in wanted.items():
            number = int(name.split("_")[1])
            for step in sorted(steps):
                generator = np.random.default_rng([self._seed, number, step])
                image = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                state = None if self._state_dim is None else generator.uniform(0, 0.1, self._state_dim)
                yield name, step, Observation(image, INSTRUCTIONS[number % len(INSTRUCTIONS)], state)

    def describe(self) -> dict[str, Any]:
        return {"kind": "fake", "path": self.path}


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy_folder(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture(scope="session")
def calibration_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "calibration"
    collect([FakeSource((5, 9, 4))], folder, count=8, seed=0)
    return folder


@pytest.fixture(scope="session")
def spec(policy_folder: Path, calibration_folder: Path) -> SweepSpec:
    return SweepSpec(str(policy_folder), str(calibration_folder), SweepSettings(group_size=32), batch_size=4)


@pytest.fixture(scope="session")
def sweep(spec: SweepSpec) -> Sweep:
    return spec.open()
