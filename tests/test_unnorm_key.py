"""A policy with the statistics of several data sets, as the published OpenVLA-7B: every command asks which, by one line
that lists them, before any weight is read; none takes one by itself."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_source import FakeSource
from tiny import tiny_policy_folder, with_two_statistics

from calibrator.__main__ import main as calibrator
from calibrator.data.calibration import collect
from calibrator.families import TorchActor
from engine_build.__main__ import main as engine_build
from engine_build.build import Request, build
from engine_build.ranges import input_peaks
from evaluation.__main__ import main as evaluation
from evaluation.robot.session import main as session
from tests.demo.materials import tiny_bag, tiny_contract
from vla_policy.core import cli
from vla_policy.core.errors import PolicyError
from vla_policy.core.formats import FULL
from vla_policy.core.manifest import Manifest
from vla_policy.core.observation import Observation
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import find_target
from vla_policy.core.verification import Verification

CHOICES = "the policy has statistics of 2 data sets and none was named; choose an unnorm_key: large, tiny"
INSTRUCTION = "pick up the red block"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    policy = with_two_statistics(tiny_policy_folder(folder / "policy"))
    for name in ("engine", "engine16"):
        uniform = "w16a16" if name == "engine16" else "w8a16_g32"
        assert engine_build(["build", "--policy", str(policy), "--uniform", uniform, "--out", str(folder / name)]) == 0
    collect([FakeSource((3, 3))], folder / "calibration", count=3, seed=0)
    tiny_contract(folder / "contract.yaml")
    tiny_bag(folder / "bag")
    return folder


def commands(folder: Path, out: Path) -> dict[str, tuple[Callable[[list[str]], int], list[str]]]:
    """Every command that uses a policy or an engine."""
    policy, engine, calibration = str(folder / "policy"), str(folder / "engine"), str(folder / "calibration")
    states = ["--policy", policy, "--calibration", calibration]
    replay = ["replay", "--bag", str(folder / "bag"), "--contract", str(folder / "contract.yaml"), "--out", str(out)]
    rollout = ["rollout", "--benchmark", "metaworld", "--out", str(out / "rollout.json")]
    uniform = ["--uniform", "w8a16_g32", "--out", str(out / "engine")]
    contract = ["--contract", str(folder / "contract.yaml")]

    def line(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
        return lambda arguments: cli.run(lambda: main(arguments))

    return {
        "sensitivity": (calibrator, ["sensitivity", *states, "--out", str(out / "sensitivity.json")]),
        "channels": (calibrator, ["channels", "measure", *states, "--out", str(out / "channels.json")]),
        "build": (line(engine_build), ["build", *states, *uniform]),
        "verify": (
            line(engine_build),
            ["verify", engine, "--policy", policy, "--samples", "2", "--out", str(out / "verification.json")],
        ),
        "bench": (line(engine_build), ["bench", engine, "--against", str(folder / "engine16"), "--repeats", "1"]),
        "replay": (evaluation, [*replay, "--engine", engine]),
        "replay of a policy": (evaluation, [*replay, "--engine", policy]),
        "replay against": (evaluation, [*replay, "--engine", engine, "--against", policy]),
        "live replay": (evaluation, [*replay, "--engine", engine, "--live"]),
        "rollout": (evaluation, [*rollout, "--engine", engine]),
        "rollout of a policy": (evaluation, [*rollout, "--policy", policy]),
        "session": (session, ["--engine", engine, *contract]),
    }


NAMES = sorted(set(commands(Path(), Path())) - {"build"})


@pytest.mark.parametrize("name", NAMES)
def test_without_a_name_the_choices_are_listed_before_weights_are_read(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(material, folder)
    for weights in (folder / "policy/model.safetensors", folder / "engine/decoder.data"):
        weights.write_bytes(b"")
    main, arguments = commands(folder, tmp_path / "out")[name]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {CHOICES}\n"
    assert main([*arguments, "--unnorm-key", "bridge"]) == 2
    expected = "unnorm_key 'bridge' is not in the policy's norm_stats; choose one of: large, tiny"
    assert capsys.readouterr().err == f"error: {expected}\n"


@pytest.mark.parametrize("name", ["sensitivity", "build", "verify", "bench", "replay against"])
def test_with_a_name_it_is_done(material: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "material"
    shutil.copytree(material, folder)
    main, arguments = commands(folder, tmp_path / "out")[name]
    assert main([*arguments, "--unnorm-key", "large"]) == 0
    if name == "verify":
        reference = Verification.load(tmp_path / "out" / "verification.json").reference
        assert reference is not None and reference.statistics == "large"


def test_what_was_named_is_what_is_used(material: Path) -> None:
    """The same tokens, ten times the action; in the engine, which holds all statistics, and in torch."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    seen = Observation(image, INSTRUCTION, np.array([0.1, 0.05], np.float32))
    for load in (load_engine, TorchActor.load):
        folder = material / ("engine" if load is load_engine else "policy")
        small, large = (load(folder, key) for key in ("tiny", "large"))
        assert (small.unnorm_key, large.unnorm_key) == ("tiny", "large")
        np.testing.assert_array_equal(small.act(seen).tokens, large.act(seen).tokens)
        np.testing.assert_allclose(large.act(seen).action[:2], 10 * small.act(seen).action[:2], rtol=1e-12)


def test_a_build_asks_where_it_reads_states(material: Path, tmp_path: Path) -> None:
    """The fixture named none, and the engine holds both; activation scales depend on how a state is normalised."""
    assert set(Manifest.load(material / "engine").to_json()["actions"]) == {"tiny", "large"}
    names = ["language_model.model.layers.0.self_attn.q_proj"]
    with pytest.raises(PolicyError, match=CHOICES):
        input_peaks(material / "policy", material / "calibration", names)
    assert input_peaks(material / "policy", material / "calibration", names, "large")[names[0]] > 0
    request = Request(material / "policy", find_target("cpu"), tmp_path, uniform=FULL, unnorm_key="bridge")
    with pytest.raises(PolicyError, match="unnorm_key 'bridge' is not in the policy's norm_stats"):
        build(request)


def test_a_section_of_a_table_names_its_statistics(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"name": "a", "title": "A", "benchmark": "metaworld", "policy": str(material / "policy"), "trials": 1}
    section["runs"] = [{"name": "full"}]
    for named, message in (({}, CHOICES), ({"unnorm_key": "bridge"}, "unnorm_key 'bridge' is not in")):
        (tmp_path / "table.yaml").write_text(yaml.safe_dump({"sections": [section | named]}))
        assert evaluation(["table", "--config", str(tmp_path / "table.yaml"), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
