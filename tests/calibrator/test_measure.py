"""A whole run: its artefact, what a killed run leaves, and what is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from choices import CHOICES, W2, W4, W8
from fake_source import FakeSource
from naive import MASS
from tables import table, unit
from tiny import tiny_policy_folder

from calibrator.__main__ import main
from calibrator.allocation.plan import Plan
from calibrator.data.calibration import collect
from calibrator.quantizers import parse_choices
from calibrator.sensitivity.executors import LocalExecutor, Task
from calibrator.sensitivity.journal import Journal, difference
from calibrator.sensitivity.measure import RunOptions, journal_folder, measure
from calibrator.sensitivity.scores import ScoreSettings, phase_of, soft_bottleneck
from calibrator.sensitivity.screening import ScreenSettings
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec, UnitLosses
from calibrator.sensitivity.table import Sensitivity, inversions, load_tensors
from vla_policy.core.errors import ArtefactError, DataError, PolicyError
from vla_policy.core.formats import FULL, Choice


class SilentBar:
    """Stands in for the progress bar; interrupts the run once `stop` evaluations are done."""

    def __init__(self, stop: int = 10**9, **_: Any) -> None:
        self.left = stop

    def __call__(self, **_: Any) -> "SilentBar":
        return self

    def __enter__(self) -> "SilentBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


GLOBS = ("projector.*", "language_model.model.layers.1.mlp.*", "vision_backbone.featurizer.blocks.0.*")
OPTIONS = RunOptions(unit_globs=GLOBS, progress=SilentBar())
SCORES = ScoreSettings()


@pytest.fixture(scope="module")
def finished(spec: SweepSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "sensitivity.json"
    measure(spec, out, SCORES, OPTIONS)
    return out


def test_scores_follow_from_the_stored_losses(finished: Path) -> None:
    sensitivity = Sensitivity.load(finished)
    losses = load_tensors(sensitivity, "losses")
    assert losses["loss"].shape == (10, 3, 8, 4)
    # Stored as float32: each number is off by 6e-8 of itself, and every score here is a mean or a sum of such. The soft
    # bottleneck takes an exponential of 10 times the loss.
    np.testing.assert_allclose(losses["loss"], losses["mass"] + losses["attribution"], rtol=1e-5)
    np.testing.assert_allclose(soft_bottleneck(losses["loss"], 0.1), losses["soft_bottleneck"], rtol=1e-4, atol=1e-7)
    for row, item in enumerate(sensitivity.units):
        for column, choice in enumerate(CHOICES):
            values = losses["soft_bottleneck"][row, column]
            assert item.omega[choice] == pytest.approx(float(values.mean()), rel=1e-4)
            by_phase = [values[losses["phase"] == phase].mean() for phase in set(losses["phase"].tolist())]
            assert item.omega_tau[choice] == pytest.approx(float(max(by_phase)), rel=1e-4)
            assert item.action_mse[choice] == pytest.approx(float(losses["action_error"][row, column].mean()), rel=1e-5)
            drop = -losses["likelihood"][row, column].mean()
            assert item.likelihood_drop[choice] == pytest.approx(float(drop), rel=1e-4)
        assert item.omega[FULL] == item.omega_tau[FULL] == item.action_mse[FULL] == 0.0
    np.testing.assert_array_equal(losses["phase"], phase_of(losses["progress"], 10))


def test_artefact_names_its_parents_and_what_was_left_out(finished: Path, spec: SweepSpec) -> None:
    raw = json.loads(finished.read_text())
    assert raw["choices"] == [choice.to_json() for choice in (*CHOICES, FULL)]
    assert set(raw["units"][0]["omega"]) == {"w2a16_g32:rtn", "w4a16_g32:rtn", "w8a16_g32:rtn", "w16a16"}
    assert raw["calibration"]["samples"] == 8 and sum(raw["calibration"]["phases"]) == 8
    policy = spec.load_policy()
    total = sum(parameter.numel() for parameter in policy.parameters())
    assert raw["unquantized_params"] + sum(item["params"] for item in raw["units"]) == total
    assert "language_model.lm_head" in raw["unmeasured"]
    assert raw["cost"]["policy_bytes"] == 4 * total
    assert not journal_folder(finished).exists()


def test_maps_show_full_precision_first(finished: Path, sweep: Sweep) -> None:
    sensitivity = Sensitivity.load(finished)
    maps, axes = load_tensors(sensitivity, "maps"), sensitivity.meta["maps"]
    assert maps["evidence"].shape == (2, 3, 4, 4) and axes["grid"] == [2, 2]
    assert axes["choices"] == ["w16a16", "w8a16_g32:rtn", "w4a16_g32:rtn", "w2a16_g32:rtn"]
    assert not maps["loss"][:, :, 0].any() and (maps["loss"][:, :, 1:] >= 0).all()
    # One pass per state gives both layers their full precision.
    np.testing.assert_array_equal(maps["evidence"][0, :, 0], maps["evidence"][1, :, 0])
    losses = load_tensors(sensitivity, "losses")["loss"]
    names = [item.name for item in sensitivity.units]
    for row, name in enumerate(axes["units"]):
        for column, sample in enumerate(axes["samples"]):
            stored = losses[names.index(name), :, sample, 0][::-1]
            np.testing.assert_allclose(maps["loss"][row, column, 1:], stored, **MASS)


def test_a_finished_run_is_not_repeated(finished: Path, spec: SweepSpec) -> None:
    before = finished.stat().st_mtime_ns
    assert measure(spec, finished, SCORES, OPTIONS).path == str(finished)
    assert finished.stat().st_mtime_ns == before


def test_a_stopped_run_continues_to_the_identical_table(spec: SweepSpec, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "sensitivity.json"
    with pytest.raises(KeyboardInterrupt):
        measure(spec, out, SCORES, replace(OPTIONS, progress=SilentBar(stop=100)))
    assert not out.exists()
    kept = len(list((journal_folder(out) / "units").iterdir()))
    assert kept > 10, "the second batch had begun"
    seen: list[Task] = []
    original = LocalExecutor.run

    def watched(self: LocalExecutor, tasks: Any) -> Any:
        seen.extend(tasks)
        return original(self, tasks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalExecutor, "run", watched)
        measure(spec, out, SCORES, OPTIONS)
    assert len({task.unit for task in seen}) == 10 and sum(len(task.samples) for task in seen) * 3 <= 10 * 8 * 3 - 100
    one, other = (json.loads(path.read_text())["units"] for path in (out, finished))
    assert one == other, "bit for bit: the same batches on the same processor, whether kept or evaluated again"


def test_other_inputs_are_refused_with_the_difference(spec: SweepSpec, finished: Path, tmp_path: Path) -> None:
    channel = replace(spec, settings=SweepSettings(parse_choices(("w2a16", "w4a16", "w8a16"))))
    with pytest.raises(ArtefactError, match=r"settings.choices.0.format was w2a16_g32, is now w2a16\)"):
        measure(channel, finished, SCORES, OPTIONS)
    with pytest.raises(ArtefactError, match=r"scores.kappa was 0.1, is now 0.2"):
        measure(spec, finished, ScoreSettings(kappa=0.2), OPTIONS)
    out = tmp_path / "sensitivity.json"
    with pytest.raises(KeyboardInterrupt):
        measure(spec, out, SCORES, replace(OPTIONS, progress=SilentBar(stop=1)))
    with pytest.raises(ArtefactError, match=r"unfinished sweep .* \(settings.choices.2 was {'format': 'w8a16_g32'"):
        measure(replace(spec, settings=SweepSettings(CHOICES[:2])), out, SCORES, OPTIONS)
    measure(channel, out, SCORES, replace(OPTIONS, resume=False, unit_globs=("projector.fc1",)))
    assert [item.name for item in Sensitivity.load(out).units] == ["projector.fc1"]


@pytest.mark.parametrize("changed", ["policy", "calibration"])
def test_another_policy_or_calibration_set_is_refused(
    spec: SweepSpec, finished: Path, policy_folder: Path, calibration_folder: Path, tmp_path: Path, changed: str
) -> None:
    """Under the very path, with other content: by a finished artefact, and by a journal with or without screening."""
    policy = shutil.copytree(policy_folder, tmp_path / "policy")
    calibration = shutil.copytree(calibration_folder, tmp_path / "calibration")
    mine = replace(spec, policy=str(policy), calibration=str(calibration))
    few = replace(OPTIONS, unit_globs=("projector.fc1", "projector.fc2"))
    screened = replace(few, screen=ScreenSettings(cap=0.4))
    done, stopped, guessed = (tmp_path / f"{name}.json" for name in ("done", "stopped", "guessed"))
    for path in (finished, *(finished.with_name(f"{name}.safetensors") for name in ("losses", "maps"))):
        shutil.copyfile(path, done if path == finished else tmp_path / path.name)
    assert measure(mine, done, SCORES, OPTIONS).path == str(done), "a copy is the same policy and calibration set"
    for out, options in ((stopped, few), (guessed, screened)):
        with pytest.raises(KeyboardInterrupt):
            measure(mine, out, SCORES, replace(options, progress=SilentBar(stop=1)))
    if changed == "policy":
        shutil.rmtree(policy)
        tiny_policy_folder(policy, seed=1)
    else:
        shutil.rmtree(calibration)
        collect([FakeSource((5, 9, 4))], calibration, count=8, seed=1)
    refusal = f"{changed}_sha256 was [0-9a-f]{{64}}, is now [0-9a-f]{{64}}"
    for out, options in ((done, OPTIONS), (stopped, few), (guessed, screened)):
        with pytest.raises(ArtefactError, match=refusal):
            measure(mine, out, SCORES, options)


def test_a_changed_neighbour_file_is_refused(spec: SweepSpec, tmp_path: Path) -> None:
    out = tmp_path / "other.json"
    result = measure(spec, out, SCORES, replace(OPTIONS, unit_globs=("projector.fc1",)))
    with open(tmp_path / "other.losses.safetensors", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(ArtefactError, match=r"other\.losses\.safetensors: not the file"):
        load_tensors(result, "losses")
    (tmp_path / "below").mkdir()
    content = json.loads(out.read_text())
    for entry in content["files"].values():
        entry["name"] = f"../{entry['name']}"
    (tmp_path / "below/other.json").write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match=r"below: an artefact names the file '\.\./other\.maps\.safetensors'"):
        load_tensors(Sensitivity.load(tmp_path / "below/other.json"), "maps")


def test_a_device_that_is_not_there_is_named(spec: SweepSpec, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"^device 'warp:3' cannot be used \(.*\); is there such a device here\?$"):
        measure(replace(spec, device="warp:3"), tmp_path / "sensitivity.json", SCORES, OPTIONS)


def test_a_device_that_is_full_keeps_what_is_finished(
    spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, evaluate = tmp_path / "sensitivity.json", Sweep.evaluate

    def full(self: Sweep, unit: str, choices: tuple[Choice, ...], samples: tuple[int, ...]) -> UnitLosses:
        if unit == "projector.fc2":
            raise torch.OutOfMemoryError
        return evaluate(self, unit, choices, samples)

    monkeypatch.setattr(Sweep, "evaluate", full)
    with pytest.raises(PolicyError, match="cpu: not enough memory for the policy and 4 states per pass; use a smaller"):
        measure(spec, out, SCORES, replace(OPTIONS, unit_globs=("projector.*",)))
    assert len(list((journal_folder(out) / "units").iterdir())) == 1


def test_a_glob_that_matches_nothing_is_named(spec: SweepSpec, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"'head\.\*' matches no layer"):
        measure(spec, tmp_path / "s.json", SCORES, replace(OPTIONS, unit_globs=("head.*",)))


def test_journal_keeps_records_exactly(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {name: generator.random((2, 3, 4)) for name in ("mass", "attribution")}
    arrays |= {name: generator.random((2, 3)) for name in ("action_error", "likelihood")}
    record = UnitLosses("layer.a", (W2, W4), (5, 1, 9), **arrays)
    Journal(tmp_path / "j", {"a": 1}).write(record)
    reopened = Journal(tmp_path / "j", {"a": 1})
    assert reopened.read_reference() is None
    assert not reopened.lacks("layer.a", (W2, W4), (5, 1, 9))
    others = [
        ("layer.b", (W2, W4), (5, 1, 9)),
        ("layer.a", (W2,), (5, 1, 9)),
        ("layer.a", (W2, W8), (5, 1, 9)),
        ("layer.a", (W2, W4), (1, 5, 9)),
    ]
    assert all(reopened.lacks(*other) for other in others)
    got = reopened.read("layer.a", (W2, W4), (5, 1, 9))
    assert all(np.array_equal(getattr(got, name), array) for name, array in arrays.items())
    (path,) = (tmp_path / "j" / "units").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtefactError, match="damaged or truncated"):
        reopened.read("layer.a", (W2, W4), (5, 1, 9))


def test_difference_names_the_entry() -> None:
    assert difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b was 1, is now 2"
    assert difference({"a": 1}, {}) == "a was 1, is now None"


def test_long_differences_stay_on_one_short_line() -> None:
    names = [f"layer_{index}" for index in range(100)]
    found = difference({"units": names}, {"units": names[:-1]})
    assert found is not None and found.startswith("units was 100 entries (") and len(found) < 80


def test_settings_that_make_no_sense_are_refused() -> None:
    for choices in ((), (W2, W2), (W2, FULL)):
        with pytest.raises(PolicyError, match="at least one, each once; w16a16 is the reference"):
            SweepSettings(choices)
    with pytest.raises(DataError, match="kappa > 0"):
        ScoreSettings(kappa=0.0)


def test_inversions_are_reported() -> None:
    noisy = unit("layer", {2: 0.3, 4: 0.1, 8: 0.2})
    found = {"unit": "layer", "choices": ["w4a16_g32:rtn", "w8a16_g32:rtn"], "omega": [0.1, 0.2]}
    assert inversions([noisy], table([noisy]).choices) == [found]


def test_commands_lead_from_calibration_to_plan(
    policy_folder: Path, calibration_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, plan = tmp_path / "sensitivity.json", tmp_path / "plan.json"
    arguments = ["sensitivity", "--policy", str(policy_folder), "--calibration", str(calibration_folder)]
    arguments += ["--out", str(scores), "--choices", "w2a16_g32", "w8a16_g32", "--units", "projector.*"]
    assert main(arguments) == 0
    curve = ["--frontier", str(tmp_path / "frontier.json"), "--frontier-points", "3"]
    assert main(["allocate", "--sensitivity", str(scores), "--out", str(plan), "--average-bits", "8", *curve]) == 0
    assert Plan.load(plan).average_bits <= 8
    assert main(["allocate", "--sensitivity", str(scores), "--out", str(plan), "--average-bits", "1"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: average bits 1 is below the minimum 2; feasible: 2 to 16")
    assert main(["sensitivity", "--policy", str(tmp_path / "none"), *arguments[3:]]) == 2
    assert "config.json: cannot be read" in capsys.readouterr().err


def test_help_does_not_load_torch() -> None:
    code = "import sys; from calibrator.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'cvxpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
