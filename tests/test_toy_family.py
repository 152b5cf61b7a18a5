"""A policy family is three folders: nothing else says that it exists, and everything works with it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_source import FakeSource
from toy_family import FOLDERS, engine_of, registered, toy_policy_folder

from calibrator.__main__ import main as calibrator
from calibrator.data.calibration import collect
from calibrator.families import TorchActor
from calibrator.sensitivity.table import Sensitivity
from engine_build.__main__ import main as engine_build
from vla_policy.core.manifest import Manifest
from vla_policy.core.observation import Observation
from vla_policy.core.runner import load_engine


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `policy`, `calibration`, `sensitivity.json`, `plan.json` and `engine`, by a user's commands."""
    folder = tmp_path_factory.mktemp("toy")
    with registered(*FOLDERS):
        collect([FakeSource((6, 5))], folder / "calibration", count=6, seed=0)
        engine_of(toy_policy_folder(folder / "policy"), folder / "calibration", folder)
        yield folder


def test_every_layer_is_measured_where_the_family_says(material: Path) -> None:
    table = Sensitivity.load(material / "sensitivity.json")
    assert {unit.name: (unit.stage, unit.kind, unit.macs // unit.params) for unit in table.units} == {
        "eye": ("vision", "encoder", 16),
        "feel": ("projector", "encoder", 1),
        "bridge": ("projector", "encoder", 16),
        "body.0": ("language", "linear", 16),
        "body.1": ("language", "linear", 16),
        "hand": ("head", "head", 2),
    }
    assert {unit.label for unit in table.units} == {f"the {unit.name}" for unit in table.units}
    low = min(table.choices, key=lambda choice: choice.precision)
    assert all(unit.omega[low] > 0 for unit in table.units)
    assert table.meta["maps"]["grid"] == [4, 4] and table.meta["language_block"] == 1


def test_its_engine_decides_as_its_torch_policy_with_the_same_formats(material: Path) -> None:
    command = ["verify", str(material / "engine"), "--policy", str(material / "policy")]
    assert engine_build([*command, "--calibration", str(material / "calibration")]) == 0
    engine, actor = load_engine(material / "engine", threads=1), TorchActor.load(material / "policy")
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    seen = Observation(image, "nothing that it reads", np.array([0.2, 0.05], np.float32))
    decision = engine.act(seen)
    assert decision.action.shape == (2, 3) and not np.allclose(decision.action, actor.act(seen).action, atol=1e-6)
    formats = {unit.realised for unit in Manifest.load(material / "engine").units}
    assert len(formats) > 1, "the plan mixes formats, or little is shown"


def test_screening_and_the_report_take_it_as_well(material: Path, tmp_path: Path) -> None:
    calibration, scores, page = material / "calibration", tmp_path / "sensitivity.json", tmp_path / "report.html"
    options = ["--choices", "w2a16_g32", "w4a16_g32", "--mode", "screened", "--cap", "0.5", "--out", str(scores)]
    given = ["--policy", str(material / "policy"), "--calibration", str(calibration)]
    assert calibrator(["sensitivity", *given, *options]) == 0
    given = ["--sensitivity", str(scores), "--calibration", str(calibration)]
    assert calibrator(["report", *given, "--out", str(page)]) == 0
    assert "toy vision" in page.read_text(encoding="utf-8") and "the eye" in page.read_text(encoding="utf-8")


def test_without_its_folders_it_is_refused_by_name(tmp_path: Path) -> None:
    """In a process that registers nothing."""
    (tmp_path / "config.json").write_text('{"model_type": "toy", "norm_stats": {}}')
    program = f"from vla_policy.core.policy_config import PolicyConfig; PolicyConfig.load({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "model_type is 'toy', expected one of: openvla, openvla_oft" in done.stderr
