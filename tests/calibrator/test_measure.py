"""A whole run: its artefact, what a killed run leaves, and what is refused."""

import json
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from choices import CHOICES, W2, W4, W8
from fake_source import FakeSource
from naive import MASS
from tables import table, unit
from tiny import tiny_policy_folder

from calibrator.__main__ import main
from calibrator.allocation.plan import Plan
from calibrator.allocation.planning import Limits, Planner, PlanRequest
from calibrator.codes import KeptCodes
from calibrator.data.calibration import collect
from calibrator.quantize import QuantizeRequest, quantize
from calibrator.quantizers import parse_choice, parse_choices
from calibrator.quantizers.packing import unpack
from calibrator.sensitivity.executors import LocalExecutor, Task
from calibrator.sensitivity.journal import Journal, difference
from calibrator.sensitivity.measure import journal_folder, measure
from calibrator.sensitivity.run import RunOptions
from calibrator.sensitivity.scores import ScoreSettings, phase_of, soft_bottleneck
from calibrator.sensitivity.screening import ScreenSettings
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec, UnitLosses
from calibrator.sensitivity.table import Objective, Sensitivity, below_floor, inversions, load_tensors
from engine_build.build import Request, build
from vla_policy.core.errors import ArtefactError, DataError, PolicyError, VlaError
from vla_policy.core.formats import FULL, Choice
from vla_policy.core.targets import find_target


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

    def update(self, count: float) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


GLOBS = ("projector.*", "language_model.model.layers.1.mlp.*", "vision_backbone.featurizer.blocks.0.*")
SAID: list[str] = []
OPTIONS = RunOptions(unit_globs=GLOBS, progress=SilentBar(), say=SAID.append)
SCORES = ScoreSettings(bins=4)


def kept(out: Path) -> int:
    """Records in the journal of an unfinished run."""
    with sqlite3.connect(journal_folder(out) / "records.sqlite") as records:
        (count,) = records.execute("SELECT count(*) FROM losses").fetchone()
    return int(count)


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
    np.testing.assert_array_equal(losses["phase"], phase_of(losses["progress"], 4))


def test_artefact_names_its_parents_and_what_was_left_out(finished: Path, spec: SweepSpec) -> None:
    raw = json.loads(finished.read_text())
    assert raw["choices"] == [choice.to_json() for choice in (*CHOICES, FULL)]
    assert set(raw["units"][0]["omega"]) == {"w2a16_g32:rtn", "w4a16_g32:rtn", "w8a16_g32:rtn", "w16a16"}
    assert raw["calibration"]["samples"] == 8 and sum(raw["calibration"]["phases"]) == 8
    policy = spec.load_policy()
    total = sum(parameter.numel() for parameter in policy.parameters())
    head = policy.get_submodule("language_model.lm_head").weight
    left_out = head.numel() - 256 * head.shape[1]  # rows of other tokens than actions are in no engine
    assert raw["unquantized_params"] + sum(item["params"] for item in raw["units"]) == total - left_out
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


def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """What is evaluated from here on."""
    seen: list[Task] = []
    original = LocalExecutor.run

    def watched(self: LocalExecutor, work: Any, ref: Any) -> Any:
        seen.extend(one for one in work if isinstance(one, Task))
        return original(self, work, ref)

    monkeypatch.setattr(LocalExecutor, "run", watched)
    return seen


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


def test_the_floor_is_measured_and_scores_below_it_are_marked(finished: Path, spec: SweepSpec, tmp_path: Path) -> None:
    result = Sensitivity.load(finished)
    # float32 keeps 1e-7; some 40 layers there and back make 1e-5 of it at most.
    assert 0 < result.noise_floor < 3e-5 and result.meta["below_floor"] == []
    eight = sorted(item.omega[W8] for item in result.units)
    marked = below_floor(result.units, CHOICES, eight[2])
    assert [len(entry["choices"]) for entry in marked] == [1, 1, 1]
    raw = json.loads(finished.read_text())
    raw["noise_floor"]["omega"] = eight[2]
    (tmp_path / "s.json").write_text(json.dumps(raw))
    plan = Planner.of(Sensitivity.load(tmp_path / "s.json"), PlanRequest(Limits(average_bits=8.0))).plan()
    quiet = {entry["unit"] for entry in marked}
    assert set(plan.details["below_floor"]) == {name for name in quiet if plan.assignment[name] == W8} != set()


def test_a_phase_of_few_states_is_warned_of(spec: SweepSpec, tmp_path: Path) -> None:
    said: list[str] = []
    quiet = replace(OPTIONS, unit_globs=("projector.fc1",), say=said.append)
    measure(spec, tmp_path / "a.json", ScoreSettings(bins=10), quiet)
    assert any("one state can set Omega_tau; collect more states, or use fewer --bins" in text for text in said)
    said.clear()
    measure(spec, tmp_path / "b.json", ScoreSettings(bins=1), quiet)
    assert not any("Omega_tau" in text for text in said)
    assert [text for text in said if "estimated from the first layer" in text and "GB of memory" in text]


def test_what_can_be_refused_is_refused_before_weights_are_read(
    spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(SweepSpec, "load_policy", never)
    with pytest.raises(ArtefactError, match="target 'toaster' is unknown"):
        SweepSettings(CHOICES, target="toaster")
    wrong = [
        (replace(spec, settings=replace(spec.settings, unnorm_key="bridge")), OPTIONS, "bridge"),
        (replace(spec, settings=replace(spec.settings, language_block=9)), OPTIONS, "blocks 0 to 1"),
        (replace(spec, device="warp"), OPTIONS, "device 'warp' cannot be used"),
        (spec, replace(OPTIONS, unit_globs=("head.*",)), "matches no layer"),
        (replace(spec, calibration=str(tmp_path / "nothing")), OPTIONS, "nothing"),
    ]
    for item, options, match in wrong:
        with pytest.raises(VlaError, match=match):
            measure(item, tmp_path / "sensitivity.json", SCORES, options)
    assert not journal_folder(tmp_path / "sensitivity.json").exists()


def test_first_order_scores_are_there_when_asked_for_and_survive_a_stop(spec: SweepSpec, tmp_path: Path) -> None:
    out = tmp_path / "sensitivity.json"
    options = replace(OPTIONS, unit_globs=("projector.*",), first_order=True)
    plain = measure(spec, tmp_path / "plain.json", SCORES, replace(options, first_order=False))
    by_proxy = PlanRequest(Limits(average_bits=4.0), Objective(signal="proxy"))
    with pytest.raises(ArtefactError, match="has no score by this signal; measure it with --mode"):
        Planner.of(plain, by_proxy).plan()
    with pytest.raises(KeyboardInterrupt):
        measure(spec, out, SCORES, replace(options, progress=SilentBar(stop=8 + 4)))
    with sqlite3.connect(journal_folder(out) / "records.sqlite") as records:
        assert records.execute("SELECT count(*) FROM first_order").fetchone()[0] > 0
    result = measure(spec, out, SCORES, options)
    assert all(item.action_proxy[W2] > item.action_proxy[W8] > 0 for item in result.units)
    Planner.of(result, by_proxy).plan()


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


def test_codes_that_are_scored_are_those_that_are_packed(
    spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that looks at the layer's inputs: `sensitivity` measures what `quantize` writes and an engine holds, to
    the last code."""
    choice, unit = parse_choice("w4a16_g32:gptq"), "projector.fc2"
    scored: list[Any] = []
    original = KeptCodes.of

    def watched(self: KeptCodes, name: str, weight: Any, wanted: Choice) -> Any:
        scored.append(original(self, name, weight, wanted))
        return scored[-1]

    monkeypatch.setattr(KeptCodes, "of", watched)
    mine = replace(spec, settings=SweepSettings((choice,)))
    result = measure(mine, tmp_path / "s.json", SCORES, replace(OPTIONS, unit_globs=(unit,)))
    request = QuantizeRequest(Path(spec.policy), tmp_path / "w", None, choice, None, Path(spec.calibration))
    store = quantize(request)
    packed = store.of(unit, spec.load_policy().get_submodule(unit).weight, choice)
    assert len(scored) > 1 and all((one.codes == packed.codes).all() for one in scored)
    assert all((one.scales == packed.scales).all() for one in scored)
    build(Request(Path(spec.policy), find_target("cpu"), tmp_path / "engine", weights=store.folder))
    stored = {tensor.name: tensor for tensor in onnx.load(str(tmp_path / "engine" / "vision.onnx")).graph.initializer}
    content = stored[f"{unit}.codes"].raw_data  # rows in whole groups, codes shifted by 8
    nibbles = unpack(content, 4, 2 * len(content)).reshape(len(packed.codes), -1)[:, : packed.codes.shape[1]]
    held = (nibbles & 15) - 8
    assert (held == scored[0].codes.numpy()).all()
    nearest = measure(
        replace(spec, settings=SweepSettings(parse_choices(("w4a16_g32",)))), tmp_path / "n.json", SCORES,
        replace(OPTIONS, unit_globs=(unit,)),
    )
    (mine_omega,), (other,) = ([v for k, v in r.units[0].omega.items() if k != FULL] for r in (result, nearest))
    assert mine_omega != other


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
    with pytest.raises(PolicyError, match=r"projector\.fc2 in w2a16_g32:rtn on 4 states with 4 states per pass; call"):
        measure(spec, out, SCORES, replace(OPTIONS, unit_globs=("projector.*",)))
    assert kept(out) == 3 * 4, "the layer before in three choices"


def test_a_glob_that_matches_nothing_is_named(spec: SweepSpec, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"'head\.\*' matches no layer"):
        measure(spec, tmp_path / "s.json", SCORES, replace(OPTIONS, unit_globs=("head.*",)))


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
