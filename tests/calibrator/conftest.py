"""A tiny random policy and a calibration set for it, shared by the calibrator's tests."""

from pathlib import Path

import pytest
from choices import CHOICES
from fake_source import FakeSource
from tiny import tiny_policy_folder

from calibrator.data.calibration import collect
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec


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
    return SweepSpec(str(policy_folder), str(calibration_folder), SweepSettings(CHOICES), batch_size=4)


@pytest.fixture(scope="session")
def sweep(spec: SweepSpec) -> Sweep:
    return spec.open()


@pytest.fixture(scope="session")
def two_images(tmp_path_factory: pytest.TempPathFactory) -> SweepSpec:
    """A policy that looks at two images, and a calibration set of such states."""
    folder = tmp_path_factory.mktemp("two_images")
    policy = tiny_policy_folder(folder / "policy", images=2)
    collect([FakeSource((5, 4), images=2)], folder / "calibration", count=4, seed=0)
    return SweepSpec(str(policy), str(folder / "calibration"), SweepSettings(CHOICES), batch_size=3)
