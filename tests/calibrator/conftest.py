"""A tiny random policy and a calibration set for it, shared by the calibrator's tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from choices import CHOICES
from fake_source import FakeSource
from measuring import OPTIONS, SCORES
from tiny import tiny_policy_folder

from calibrator.data.calibration import collect
from calibrator.quantizers import methods, parse_choice
from calibrator.sensitivity.measure import measure
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec
from vla_policy.core.formats import Choice


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
def finished(spec: SweepSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of a short run."""
    out = tmp_path_factory.mktemp("run") / "sensitivity.json"
    measure(spec, out, SCORES, OPTIONS)
    return out


@pytest.fixture(scope="session")
def two_images(tmp_path_factory: pytest.TempPathFactory) -> SweepSpec:
    """A policy that looks at two images, and a calibration set of such states."""
    folder = tmp_path_factory.mktemp("two_images")
    policy = tiny_policy_folder(folder / "policy", images=2)
    collect([FakeSource((5, 4), images=2)], folder / "calibration", count=4, seed=0)
    return SweepSpec(str(policy), str(folder / "calibration"), SweepSettings(CHOICES), batch_size=3)


BY_INPUT = '''
"""A method that somebody adds: codes of the input's typical size."""
from calibrator.quantizers.base import Needs
from calibrator.quantizers.weights import by_groups, half


class ByInput:
    version, defaults, needs = 3, {"share": 0.5}, Needs.INPUTS

    def quantize(self, weight, fmt, parameters, statistics):
        size = parameters["share"] * statistics.peak

        def fixed(grouped):
            scales = half(grouped.new_full(grouped.shape[:2], size))
            return (grouped / scales[..., None]).round().clamp(-1, 1), scales

        return by_groups(weight, fmt, fixed)


QUANTIZER = ByInput()
'''


@pytest.fixture
def by_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Choice]:
    """One more module in the folder of the rounding methods, which looks at the layers' inputs."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "by_input.py").write_text(BY_INPUT)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    yield parse_choice("w4a16:by_input")
    sys.modules.pop("calibrator.quantizers.methods.by_input", None)
