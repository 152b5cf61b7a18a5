"""A policy whose tokens are no actions, as UniVLA's latent ones behind the vocabulary, is not decoded as one: whatever
meets its states in full refuses it; the robot's own loop goes on choosing actions only."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_source import FakeSource
from safetensors.torch import load_file, save_file
from tiny import tiny_policy_folder

from calibrator.__main__ import main as calibrator
from calibrator.data.calibration import collect, load_calibration
from calibrator.families import TorchActor
from calibrator.sensitivity.table import Sensitivity
from engine_build.__main__ import main as engine_build
from engine_build.ranges import input_peaks
from vla_policy.core import cli
from vla_policy.core.errors import PolicyError
from vla_policy.core.manifest import Manifest
from vla_policy.core.prismatic.config import PrismaticConfig
from vla_policy.core.runner import load_engine

HEAD = "language_model.lm_head.weight"
STATES = 4


def set_rows(policy: Path, *rows: torch.Tensor) -> Path:
    """Writes rows of the head behind the vocabulary, where UniVLA's latent actions are."""
    config = PrismaticConfig.load(policy)
    assert isinstance(config, PrismaticConfig)
    tensors = load_file(policy / "model.safetensors")
    for index, row in enumerate(rows):
        tensors[HEAD][config.token_vocab + index] = row.to(tensors[HEAD].dtype)
    save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    return policy


def direction(policy: Path) -> torch.Tensor:
    """Any: the head's row of an action."""
    return load_file(policy / "model.safetensors")[HEAD][-65].float()


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`latent` prefers one of two tokens behind the vocabulary in every state, and has an `engine`."""
    folder = tmp_path_factory.mktemp("latent")
    policy = tiny_policy_folder(folder / "latent")
    set_rows(policy, 100 * direction(policy), -100 * direction(policy))
    collect([FakeSource((STATES,))], folder / "calibration", count=STATES, seed=0)
    build = ["build", "--policy", str(policy), "--uniform", "w16a16", "--out", str(folder / "engine")]
    assert engine_build(build) == 0
    return folder


def line(arguments: list[str]) -> int:
    return cli.run(lambda: engine_build(arguments))


@pytest.mark.parametrize(
    ("main", "command", "where"),
    [
        (calibrator, "sensitivity --policy latent --calibration calibration --out sensitivity.json", "in 4 of 4"),
        (line, "verify engine --policy latent --calibration calibration", "calibration: in 4 of 4"),
        (line, "verify engine --policy latent --samples 3", "names real states): in 3 of 3"),
    ],
)
def test_it_is_refused_with_the_number_of_states(
    material: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[list[str]], int],
    command: str,
    where: str,
) -> None:
    monkeypatch.chdir(material)
    assert main(command.split()) == 2
    (error,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error:")]
    assert f"{where} states the policy prefers a token that is no action; its tokens have another meaning" in error
    assert not Path("sensitivity.json").exists()


def test_nor_are_activation_scales_taken_from_it(material: Path) -> None:
    with pytest.raises(PolicyError, match="in 4 of 4 states the policy prefers a token that is no action"):
        input_peaks(material / "latent", material / "calibration", ["language_model.model.layers.0.self_attn.q_proj"])


def test_an_engine_chooses_among_actions_because_its_head_has_no_other_rows(material: Path) -> None:
    engine = load_engine(material / "engine", threads=1)
    decision = engine.act(load_calibration(material / "calibration").observation(0))
    assert np.isfinite(decision.action).all()
    manifest = Manifest.load(material / "engine")
    layout = manifest.to_json()["actions"]["tiny"]
    assert (decision.tokens >= layout["first_token"]).all() and (decision.tokens <= layout["last_token"]).all()
    (head,) = [unit for unit in manifest.units if unit.kind == "head"]
    config = PrismaticConfig.load(material / "latent")
    assert isinstance(config, PrismaticConfig)
    others = config.text.vocab_size - 256
    assert (head.outputs, head.code_bytes) == (256, 256 * 64 * 2)
    assert any(
        f"{others} rows and {others * 64 * 2:,} bytes in w16a16, are left out" in note for note in manifest.notes
    )


def test_a_few_states_are_recorded_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One state of four: the other token's row is just so long that its logit is the largest there and nowhere else."""
    policy = set_rows(tiny_policy_folder(tmp_path / "policy"), direction(tmp_path / "policy"))
    collect([FakeSource((STATES,))], tmp_path / "calibration", count=STATES, seed=0)
    actor, states = TorchActor.load(policy), load_calibration(tmp_path / "calibration")
    lengths = []
    for index in range(STATES):
        seen = states.observation(index)
        tokens = torch.from_numpy(actor.act(seen).tokens)[None]
        with torch.no_grad():
            output = actor.policy.output(actor.inputs(seen), tokens)[0]
        other = output[:, -64]
        needed = output[:, -320:-64].max(-1).values / other
        lengths.append(float(needed[other > 0].min()) if (other > 0).any() else np.inf)
    first, second = sorted(lengths)[:2]
    assert second > 1.05 * first, "the head's bfloat16 tells the two apart"
    set_rows(policy, (first * second) ** 0.5 * direction(policy))
    out = tmp_path / "sensitivity.json"
    units = ["--units", "projector.*", "--choices", "w4a16_g32"]
    states_of = ["--policy", str(policy), "--calibration", str(tmp_path / "calibration")]
    assert calibrator(["sensitivity", *states_of, *units, "--out", str(out)]) == 0
    assert Sensitivity.load(out).meta["stray_states"] == 1
    assert "note: in 1 of the states the policy prefers a token that is no action" in capsys.readouterr().out
