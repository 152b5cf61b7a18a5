"""A backend is two folders: with them on the path, and a machine that names it, everything else takes it as it is."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ragged import observation, write_policy

import engine_build.backends
import vla_policy.core.backends
from calibrator.families import TorchActor, live_units
from calibrator.quantizers import parse_choice, quantize_policy
from engine_build.__main__ import main
from engine_build.verify import verify
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import TARGETS, Runtime, Target, find_target

HERE = Path(__file__).parent / "toy_backend"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy's two folders are on the packages' paths, and a machine runs it."""
    for package, folder in ((vla_policy.core.backends, "robot"), (engine_build.backends, "workstation")):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(HERE / folder)])
    monkeypatch.setitem(TARGETS, "toy", Target("toy", "a machine for toys", (Runtime("toy", (1,)),), None))
    yield
    for package in ("vla_policy.core.backends", "engine_build.backends"):
        sys.modules.pop(f"{package}.toy", None)


@pytest.mark.usefixtures("toy")
def test_a_toy_backend_builds_verifies_and_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, engine_folder = write_policy(tmp_path / "policy"), tmp_path / "engine"
    build = ["build", "--policy", str(policy), "--target", "toy", "--backend", "toy", "--out", str(engine_folder)]
    for _ in range(2):  # the second replaces the first
        assert main([*build, "--uniform", "w8a16"]) == 0
    files = sorted(path.name for path in engine_folder.iterdir())
    assert files == ["decoder.toy", "exported.json", "manifest.json", "tokenizer.json", "vision.toy"]
    assert {unit.realised for unit in Manifest.load(engine_folder).units} == {"w8a16"}
    packed = sum(unit.code_bytes for unit in Manifest.load(engine_folder).units)
    assert verify(engine_folder, policy, None).bytes > packed
    assert main(["verify", str(engine_folder), "--policy", str(policy), "--samples", "1"]) == 0
    assert "on a toy: 1 states; torch with the same formats: logits differ by" in capsys.readouterr().out

    engine, actor = load_engine(engine_folder), TorchActor.load(policy)
    choice = parse_choice("w8a16:rtn")
    quantize_policy(actor.policy, {unit.name: choice for unit in live_units(actor.policy)})
    for seed in range(2):
        decision, timings = engine.decide(observation(seed))
        np.testing.assert_array_equal(decision.tokens, actor.act(observation(seed)).tokens)
        assert [call for call, _ in timings.calls] == ["vision", "prefill", "step", "step"]


@pytest.mark.usefixtures("toy")
def test_its_rules_are_those_of_its_version() -> None:
    listed, installed = find_target("toy"), find_target("toy").on("toy", (2, 0))
    assert listed.why_not(Format(8, 16)) == "no kernel runs w8a16 on layers of kind linear with toy 1"
    assert listed.nearest(Format(8, 16)) == Format(16, 16)
    assert installed.why_not(Format(8, 16)) is None
    assert installed.why_not(Format(4, 16)) == "the toy knows bytes only"


def test_without_its_folders_it_is_unknown(toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build.backends, "__path__", engine_build.backends.__path__[:-1])
    command = ["build", "--policy", str(write_policy(tmp_path / "policy")), "--target", "toy", "--uniform", "w16a16"]
    with pytest.raises(ArtefactError, match="backend 'toy' builds nothing here; choose one of: onnxruntime, "):
        main([*command, "--out", str(tmp_path / "engine")])
