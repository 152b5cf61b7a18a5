"""What a killed run leaves is taken up again, unless it is of other inputs or another version."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from choices import CHOICES, W2, W4, W8
from fake_source import FakeSource
from measuring import OPTIONS, SCORES, SilentBar, asked_for, kept
from tiny import tiny_policy_folder

from calibrator.data.calibration import collect
from calibrator.quantizers import parse_choices
from calibrator.sensitivity.journal import Journal, difference
from calibrator.sensitivity.measure import journal_folder, measure
from calibrator.sensitivity.screening import ScreenSettings
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec, UnitLosses
from calibrator.sensitivity.table import Sensitivity
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.formats import Choice


def test_a_finished_run_is_not_repeated(finished: Path, spec: SweepSpec) -> None:
    before = finished.stat().st_mtime_ns
    assert measure(spec, finished, SCORES, OPTIONS).path == str(finished)
    assert finished.stat().st_mtime_ns == before


@pytest.mark.parametrize("batch", [4, 1, 3])
def test_a_stopped_run_continues_with_any_batch_size(
    spec: SweepSpec, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Every evaluation exactly once, also where a smaller batch is what the killed run lacked."""
    out = tmp_path / "sensitivity.json"
    with pytest.raises(KeyboardInterrupt):
        measure(spec, out, SCORES, replace(OPTIONS, progress=SilentBar(stop=150)))
    assert not out.exists()
    before = kept(out)
    assert before > 100, "the second batch had begun"
    seen = asked_for(monkeypatch)
    measure(replace(spec, batch_size=batch), out, SCORES, OPTIONS)
    assert max(len(task.samples) for task in seen) <= batch
    floor = 10 * 2
    assert sum(len(task.samples) for task in seen) == 10 * 8 * 3 + floor - before
    one, other = (json.loads(path.read_text())["units"] for path in (out, finished))
    if batch == 4:
        assert one == other, "bit for bit: the same batches on the same processor, whether kept or evaluated again"
    for row, expected in zip(one, other, strict=True):
        for score in ("omega", "omega_tau"):
            for choice, value in expected[score].items():
                assert row[score][choice] == pytest.approx(value, rel=5e-3, abs=3e-5), "another order of sums"


def test_records_count_for_more_choices_and_for_fewer_layers(
    spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sensitivity.json"
    few = replace(spec, settings=SweepSettings(CHOICES[:1]))
    with pytest.raises(KeyboardInterrupt):
        measure(few, out, SCORES, replace(OPTIONS, unit_globs=("projector.*",), progress=SilentBar(stop=32)))
    before = kept(out)
    seen = asked_for(monkeypatch)
    measure(spec, out, SCORES, replace(OPTIONS, unit_globs=("projector.fc1",)))
    assert before > 8 and {task.choices for task in seen} >= {(W4,), (W8,)}
    assert not any(task.choices == (W2,) for task in seen), "kept from the run that was to measure nothing else"


def test_other_inputs_are_refused_with_the_difference(spec: SweepSpec, finished: Path, tmp_path: Path) -> None:
    channel = replace(spec, settings=SweepSettings(parse_choices(("w2a16", "w4a16", "w8a16"))))
    with pytest.raises(ArtefactError, match=r"choices.0.format was w2a16_g32, is now w2a16\)"):
        measure(channel, finished, SCORES, OPTIONS)
    with pytest.raises(ArtefactError, match=r"scores.kappa was 0.1, is now 0.2"):
        measure(spec, finished, replace(SCORES, kappa=0.2), OPTIONS)
    out = tmp_path / "sensitivity.json"
    with pytest.raises(KeyboardInterrupt):
        measure(spec, out, SCORES, replace(OPTIONS, progress=SilentBar(stop=1)))
    coarse = replace(spec, settings=replace(spec.settings, epsilon=1e-6))
    with pytest.raises(ArtefactError, match=r"unfinished sweep .* \(settings.epsilon was 1e-12, is now 1e-06\)"):
        measure(coarse, out, SCORES, OPTIONS)
    measure(coarse, out, SCORES, replace(OPTIONS, resume=False, unit_globs=("projector.fc1",)))
    result = Sensitivity.load(out)
    assert [item.name for item in result.units] == ["projector.fc1"] and result.meta["epsilon"] == 1e-6


@pytest.mark.parametrize("what", ["torch", "transformers", "vla-deploy", "code"])
def test_records_of_another_version_are_refused(
    spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    out = tmp_path / "sensitivity.json"
    with pytest.raises(KeyboardInterrupt):
        measure(spec, out, SCORES, replace(OPTIONS, progress=SilentBar(stop=1)))
    if what == "code":
        monkeypatch.setattr("calibrator.sensitivity.run.sha256_folder", lambda *_: "0" * 64)
    else:
        monkeypatch.setattr(
            "calibrator.sensitivity.run.version", lambda name: "0.1" if name == what else version(name)
        )
    with pytest.raises(ArtefactError, match=rf"\(versions.{what} was .*, is now 0[.0-9]+\)"):
        measure(spec, out, SCORES, OPTIONS)


def test_a_second_run_on_the_same_result_is_refused(spec: SweepSpec, tmp_path: Path) -> None:
    """While the first is at work, from another process; with and without --no-resume."""
    out = tmp_path / "sensitivity.json"
    with pytest.raises(KeyboardInterrupt):
        measure(spec, out, SCORES, replace(OPTIONS, progress=SilentBar(stop=30)))
    signature = json.loads((journal_folder(out) / "signature.json").read_text())["signature"]
    program = (
        "import json, sys; from pathlib import Path; from calibrator.sensitivity.journal import Journal\n"
        "with Journal(Path(sys.argv[1]), json.loads(sys.argv[2])):\n"
        "    print('open', flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", program, str(journal_folder(out)), json.dumps(signature)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "open\n"
        for resume in (True, False):
            with pytest.raises(ArtefactError, match="another run is writing this result; wait for it"):
                measure(spec, out, SCORES, replace(OPTIONS, resume=resume))
        other.kill()
    assert kept(out) > 0, "and nothing of the first run is lost"
    measure(spec, out, SCORES, replace(OPTIONS, unit_globs=("projector.fc1",)))


def test_the_check_of_conventions_is_not_repeated(
    spec: SweepSpec, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped behind it goes on with its outcome, and with the reference's fixed scales."""
    out = tmp_path / "sensitivity.json"
    with pytest.raises(KeyboardInterrupt):
        measure(spec, out, SCORES, replace(OPTIONS, progress=SilentBar(stop=8 + 4)))
    monkeypatch.setattr("calibrator.sensitivity.measure.check", lambda *_: pytest.fail("checked again"))
    monkeypatch.setattr("calibrator.sensitivity.sweep.reference", lambda *_: pytest.fail("decided again"))
    result, whole = measure(spec, out, SCORES, OPTIONS), Sensitivity.load(finished)
    assert result.meta["conventions"] == whole.meta["conventions"]
    assert result.input_peaks == whole.input_peaks and all(peak > 0 for peak in result.input_peaks.values())


@pytest.mark.parametrize("changed", ["policy", "calibration"])
def test_another_policy_or_calibration_set_is_refused(
    spec: SweepSpec, finished: Path, policy_folder: Path, calibration_folder: Path, tmp_path: Path, changed: str
) -> None:
    """Under the very path, with other content: by a finished artefact, and by a journal with or without screening."""
    policy = shutil.copytree(policy_folder, tmp_path / "policy")
    calibration = shutil.copytree(calibration_folder, tmp_path / "calibration")
    mine = replace(spec, policy=str(policy), calibration=str(calibration))
    few = replace(OPTIONS, unit_globs=("projector.fc1", "projector.fc2"))
    screened = replace(few, screen=ScreenSettings(cap=0.6))
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


def test_a_device_that_is_full_keeps_what_is_finished(
    spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, evaluate = tmp_path / "sensitivity.json", Sweep.evaluate

    def full(self: Sweep, unit: str, choices: tuple[Choice, ...], samples: tuple[int, ...]) -> UnitLosses:
        if unit == "projector.fc2":
            raise torch.OutOfMemoryError
        return evaluate(self, unit, choices, samples)

    monkeypatch.setattr(Sweep, "evaluate", full)
    with pytest.raises(PolicyError, match=r"projector\.fc2 in w2a16_g32:rtn on 4 states with 4 states per pass; call"):
        measure(spec, out, SCORES, replace(OPTIONS, unit_globs=("projector.*",)))
    assert kept(out) == 3 * 4, "the layer before in three choices"


def test_journal_keeps_records_exactly(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {name: generator.random((2, 3, 4)) for name in ("mass", "attribution")}
    arrays |= {name: generator.random((2, 3)) for name in ("action_error", "likelihood")}
    with Journal(tmp_path / "j", {"a": 1}) as journal:
        journal.write(UnitLosses("layer.a", (W2, W4), (5, 1, 9), **arrays))
    with Journal(tmp_path / "j", {"a": 1}) as reopened:
        assert reopened.read_reference() is None
        assert reopened.missing("layer.a", W2, (1, 5, 9)) == ()
        assert reopened.missing("layer.a", W2, (9, 4, 1)) == (4,)
        assert reopened.missing("layer.b", W2, (5,)) == reopened.missing("layer.a", W8, (5,)) == (5,)
        for row, choice in enumerate((W2, W4)):
            got = reopened.read("layer.a", choice, (9, 5))
            assert got.choices == (choice,) and got.samples == (9, 5)
            assert all(np.array_equal(getattr(got, name)[0], array[row][[2, 0]]) for name, array in arrays.items())
    path = tmp_path / "j" / "records.sqlite"
    path.write_bytes(b"x" * 100 + path.read_bytes()[100:])
    with pytest.raises(ArtefactError, match=r"damaged .*; discard the unfinished run with --no-resume"):
        Journal(tmp_path / "j", {"a": 1})


def test_difference_names_the_entry() -> None:
    assert difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b was 1, is now 2"
    assert difference({"a": 1}, {}) == "a was 1, is now None"


def test_long_differences_stay_on_one_short_line() -> None:
    names = [f"layer_{index}" for index in range(100)]
    found = difference({"units": names}, {"units": names[:-1]})
    assert found is not None and found.startswith("units was 100 entries (") and len(found) < 80
