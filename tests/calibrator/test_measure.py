"""A whole run: its artefact, its marks, and what is refused before it begins."""

import json
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from choices import CHOICES, W2, W8
from measuring import OPTIONS, SCORES, SilentBar
from naive import MASS
from tables import table, unit

from calibrator.__main__ import main
from calibrator.allocation.plan import Plan
from calibrator.allocation.planning import Limits, Planner, PlanRequest
from calibrator.codes import KeptCodes
from calibrator.quantize import QuantizeRequest, quantize
from calibrator.quantizers import parse_choice, parse_choices
from calibrator.quantizers.packing import unpack
from calibrator.sensitivity.measure import journal_folder, measure
from calibrator.sensitivity.scores import ScoreSettings, phase_of, soft_bottleneck
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec
from calibrator.sensitivity.table import Objective, Sensitivity, below_floor, inversions, load_tensors
from engine_build.build import Request, build
from vla_policy.core.errors import ArtefactError, DataError, PolicyError, VlaError
from vla_policy.core.formats import FULL, Choice
from vla_policy.core.targets import find_target


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


def test_a_glob_that_matches_nothing_is_named(spec: SweepSpec, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"'head\.\*' matches no layer"):
        measure(spec, tmp_path / "s.json", SCORES, replace(OPTIONS, unit_globs=("head.*",)))


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
