"""Codes on disk: what is packed is what was computed, whatever happens on the way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from choices import W2, W4, W8
from fake_source import FakeSource
from ragged import write_plan
from tiny import tiny_policy_folder

from calibrator import codes
from calibrator import quantize as command
from calibrator.__main__ import main
from calibrator.data.calibration import collect, load_calibration
from calibrator.data.statistics import input_statistics
from calibrator.families import TorchActor, live_units, load_policy
from calibrator.quantize import QuantizeRequest
from calibrator.quantizers import find_layer, parse_choice, quantize
from calibrator.quantizers.store import Store, layer_path
from engine_build.__main__ import main as engine_build
from engine_build.build import chosen
from engine_build.plan import legalize, stored_plan
from engine_build.weights import layers_of
from vla_policy.core.cli import run
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import FULL, Choice
from vla_policy.core.manifest import Manifest
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.targets import find_target

MIXED = (W2, W4, W8, FULL, parse_choice("w4a16_g32:mse"), parse_choice("w4a8_g32"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `policy`, `plan.json`, `calibration`, and the plan's `weights`."""
    folder = tmp_path_factory.mktemp("store")
    policy = tiny_policy_folder(folder / "policy")
    collect([FakeSource((4, 3))], folder / "calibration", count=4, seed=0)
    names = [unit.name for unit in live_units(load_policy(policy))]
    assignment = {name: MIXED[index % len(MIXED)] for index, name in enumerate(names)}
    write_plan(folder / "plan.json", sha256_policy(policy), assignment)
    command.quantize(request(folder))
    return folder


def request(folder: Path, **changes: Any) -> QuantizeRequest:
    return replace(QuantizeRequest(folder / "policy", folder / "weights", folder / "plan.json"), **changes)


def test_what_comes_out_is_what_was_computed(place: Path) -> None:
    store, policy = Store.open(place / "weights"), load_policy(place / "policy")
    assert store.identity.parents["policy"] == sha256_policy(place / "policy")
    for unit, choice in store.identity.choices.items():
        if choice == FULL:
            assert not layer_path(store.folder, unit).exists()
            continue
        weight = find_layer(policy, unit).weight
        got, expected = store.of(unit, weight, choice), quantize(weight, choice)
        assert torch.equal(got.codes, expected.codes) and torch.equal(got.scales, expected.scales)
        assert torch.equal(got.dequantize(), expected.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layers_take_the_bytes_of_their_bits(place: Path, tmp_path: Path, bits: int) -> None:
    choice = parse_choice(f"w{bits}a16_g32:mse")
    store = command.quantize(request(place, out=tmp_path / "w", plan=None, uniform=choice))
    unit = "projector.fc1"
    weight = find_layer(load_policy(place / "policy"), unit).weight
    held, scales = weight.numel() * bits // 8, weight.numel() // 32 * 2
    assert held + scales < layer_path(store.folder, unit).stat().st_size < held + scales + 400
    assert torch.equal(store.of(unit, weight, choice).codes, quantize(weight, choice).codes)


def test_an_engine_of_stored_codes_is_the_engine_of_computed_ones(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = ["--policy", str(place / "policy")]
    for option, source, out in (("--weights", "weights", "stored"), ("--plan", "plan.json", "computed")):
        assert engine_build(["build", *policy, option, str(place / source), "--out", str(tmp_path / out)]) == 0
    stored, computed = (Manifest.load(tmp_path / name) for name in ("stored", "computed"))
    assert stored.files == computed.files and stored.units == computed.units
    assert stored.parents == computed.parents | {"weights": Store.open(place / "weights").sha256}
    verify = ["verify", str(tmp_path / "stored"), *policy, "--samples", "2"]
    assert run(lambda: engine_build(verify)) == 2
    assert "packed from weights" in capsys.readouterr().err
    assert run(lambda: engine_build([*verify, "--weights", str(place / "weights")])) == 0


def test_the_plans_backend_goes_with_its_codes(place: Path, tmp_path: Path) -> None:
    """What the latencies were measured with runs the engine, also where it is packed from a store and legalized."""
    policy, target = place / "policy", find_target("cpu")
    layers, sha256 = layers_of(PolicyConfig.load(policy)), sha256_policy(policy)
    plan = write_plan(tmp_path / "plan.json", sha256, dict.fromkeys(layers, parse_choice("w8a16")))
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"backend": "openvino"}))
    stored = stored_plan(command.quantize(request(place, plan=plan, out=tmp_path / "w")), sha256, layers)
    assert stored.backend == legalize(stored, layers, target).backend == "openvino"
    assert chosen(target, None, stored, layers)[0].backend == "openvino"


def test_a_stopped_run_continues(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    write = codes.write_layer

    def stops(folder: Path, unit: str, weight: Any) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(unit)
        write(folder, unit, weight)

    wanted = request(place, out=tmp_path / "w")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(codes, "write_layer", stops)
        command.quantize(wanted)
    with pytest.raises(ArtefactError, match="is unfinished; call `calibrator quantize` again, which continues it"):
        Store.open(tmp_path / "w")
    before = {unit: layer_path(tmp_path / "w", unit).stat().st_mtime_ns for unit in done}
    store = command.quantize(wanted)
    assert {unit: layer_path(tmp_path / "w", unit).stat().st_mtime_ns for unit in done} == before
    assert store.files == Store.open(place / "weights").files


def test_other_inputs_are_refused_with_the_difference(place: Path) -> None:
    with pytest.raises(ArtefactError, match=r"other inputs \(layers\..*\.recipe.method was rtn, is now mse"):
        command.quantize(request(place, method="mse"))
    with pytest.raises(ArtefactError, match=r"other inputs \(parents.calibration was None"):
        command.quantize(request(place, calibration=place / "calibration"))


def test_a_store_of_another_policy_or_plan_is_refused(place: Path, tmp_path: Path) -> None:
    other = tiny_policy_folder(tmp_path / "policy", seed=1)
    arguments = ["build", "--policy", str(other), "--weights", str(place / "weights"), "--out", str(tmp_path / "e")]
    with pytest.raises(ArtefactError, match=r"made for the policy with sha256 .*; quantize this policy"):
        engine_build(arguments)
    with pytest.raises(ArtefactError, match="made for the policy with sha256"):
        command.quantize(replace(request(place), policy=other, out=tmp_path / "w"))
    store = Store.open(place / "weights")
    with pytest.raises(ArtefactError, match=r"holds projector.fc1 in .*, wanted is w3a16:mse; quantize for this plan"):
        store.of("projector.fc1", torch.zeros(2, 2), parse_choice("w3a16"))


def test_an_altered_file_is_refused(place: Path, tmp_path: Path) -> None:
    store = command.quantize(request(place, out=tmp_path / "w", plan=None, uniform=W4))
    path = layer_path(store.folder, "projector.fc1")
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ArtefactError, match=r"projector.fc1.safetensors: not the file that weights.json names"):
        store.of("projector.fc1", torch.zeros(64, 128), W4)
    with pytest.raises(ArtefactError, match=r"of another shape than projector\.fc2"):
        store.of("projector.fc2", torch.zeros(3, 5), W4)


def test_a_method_that_looks_at_inputs_is_asked_for_them(
    place: Path, tmp_path: Path, by_input: Choice, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, uniform = ["--policy", str(place / "policy")], ["--uniform", str(by_input)]
    build = ["build", *policy, "--out", str(tmp_path / "e")]
    assert run(lambda: engine_build([*build, *uniform])) == 2
    hint = f"`calibrator quantize {' '.join([*policy, *uniform])} --calibration C --out W` and build with --weights"
    assert hint in capsys.readouterr().err
    quantized = ["quantize", *policy, *uniform, "--out", str(tmp_path / "w")]
    assert main(quantized) == 2
    assert "needs inputs to look at; name states with --calibration" in capsys.readouterr().err
    assert main([*quantized, "--calibration", str(place / "calibration")]) == 0
    assert "36 x w4a16:by_input" in capsys.readouterr().out
    store, actor = Store.open(tmp_path / "w"), TorchActor.load(place / "policy")
    states = load_calibration(place / "calibration")
    assert store.identity.parents["calibration"] == states.sha256
    seen = input_statistics(actor, states, list(store.files), "states")
    for unit in store.files:
        weight = find_layer(actor.policy, unit).weight
        assert torch.equal(store.of(unit, weight, by_input).codes, quantize(weight, by_input, seen[unit]).codes)
    assert run(lambda: engine_build([*build, "--weights", str(tmp_path / "w")])) == 0


def test_statistics_are_those_of_the_rows_that_pass(place: Path) -> None:
    """Oracle: every input kept, and NumPy."""
    actor, states = TorchActor.load(place / "policy"), load_calibration(place / "calibration")
    names = ["vision_backbone.featurizer.patch_embed.proj", "projector.fc1", "language_model.lm_head"]
    kept: dict[str, list[np.ndarray]] = {name: [] for name in names}
    handles = [
        find_layer(actor.policy, name).register_forward_pre_hook(
            lambda module, args, name=name: kept[name].append(args[0].numpy().copy())
        )
        for name in names
    ]
    for index in range(len(states)):
        actor.act(states.observation(index))
    for handle in handles:
        handle.remove()
    found = input_statistics(actor, states, names, "states", second_moments=True)
    for name in names:
        rows = [
            torch.nn.functional.unfold(torch.from_numpy(x), 16, stride=16).transpose(1, 2).numpy() if x.ndim == 4 else x
            for x in kept[name]
        ]
        every = np.concatenate([x.reshape(-1, x.shape[-1]) for x in rows]).astype(np.float64)
        assert found[name].tokens == len(every) and found[name].peak == np.abs(every).max().astype(np.float32)
        np.testing.assert_array_equal(found[name].peaks, np.abs(every).max(0).astype(np.float32))
        moment = found[name].second_moment
        assert moment is not None
        np.testing.assert_allclose(moment, every.T @ every / len(every), rtol=1e-9, atol=1e-12)


def test_the_index_says_from_what_the_codes_were_made(place: Path) -> None:
    raw = json.loads((place / "weights" / "weights.json").read_text())
    assert raw["kind"] == "weights" and set(raw["parents"]) == {"policy", "plan"}
    assert raw["layers"]["projector.fc1"]["recipe"] is None or raw["layers"]["projector.fc1"]["recipe"]["version"] >= 1
