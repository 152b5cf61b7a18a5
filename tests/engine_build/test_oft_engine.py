"""Engines of an OpenVLA-OFT policy: one pass, a chunk of actions, the same numbers as torch."""

from pathlib import Path

import numpy as np
import pytest
from choices import rtn
from ragged import mixed_assignment, write_plan
from rounding import NETWORK
from tiny import INSTRUCTIONS, tiny_policy_folder

from calibrator.families import TorchActor
from calibrator.modules.chain import Runs
from calibrator.quantizers import quantize_policy
from engine_build.bench import bench, report
from engine_build.build import Request, build
from engine_build.costs import PROMPT_TOKENS, runs_per_action
from engine_build.verify import States, verify
from engine_build.weights import layers_of
from vla_policy.core.errors import DataError
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import FULL, Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.program import Range
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import find_target

CHUNK, DIM = 4, 3
FORMATS = ["w2a16_g32", "w4a16_g32", "w8a16_g32", "w16a16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy` of two images and a state, `plan.json`, and the engines `engine` and `engine16`."""
    made = tmp_path_factory.mktemp("oft_engine")
    policy = tiny_policy_folder(made / "policy", images=2, chunk=CHUNK)
    assignment = mixed_assignment(list(layers_of(PolicyConfig.load(policy))), FORMATS)
    plan = write_plan(made / "plan.json", sha256_policy(policy), assignment)
    build(Request(policy, find_target("cpu"), made / "engine", plan=plan))
    build(Request(policy, find_target("cpu"), made / "engine16", uniform=FULL))
    return made


def observation(seed: int) -> Observation:
    rng = np.random.default_rng(seed)
    image, wrist = rng.integers(0, 256, (2, 40, 30, 3), dtype=np.uint8)
    return Observation(image, INSTRUCTIONS[seed % 3], rng.uniform(0, 0.1, 2).astype(np.float32), (wrist,))


def test_actions_equal_the_torch_policy_s(folder: Path) -> None:
    engine, actor = load_engine(folder / "engine", threads=1), TorchActor.load(folder / "policy")
    names = list(layers_of(engine.config))
    quantize_policy(actor.policy, mixed_assignment(names, FORMATS))
    for seed in range(4):
        expected, (got, timings) = actor.act(observation(seed)), engine.decide(observation(seed))
        assert got.action.shape == (CHUNK, DIM) and got.tokens.size == 0
        assert [call for call, _ in timings.calls] == ["vision", "decide"]
        np.testing.assert_allclose(got.action, expected.action, atol=NETWORK * np.abs(expected.action).max())
    moved = Observation(*vars(observation(0)).values())
    other = Observation(moved.image, moved.instruction, np.array([0.9, 0.09], np.float32), moved.further)
    assert np.abs(engine.act(other).action - engine.act(moved).action).max() > 1e-3, "the state matters"
    with pytest.raises(DataError, match="state: expected 2 finite values"):
        engine.act(Observation(moved.image, moved.instruction, None, moved.further))


def test_it_is_verified_and_measured_like_any_other(folder: Path) -> None:
    outcome = verify(folder / "engine", folder / "policy", States(None, samples=2)).reference
    assert outcome is not None and outcome.layers is not None
    assert outcome.same_formats.equal_tokens is None and outcome.same_formats.scores_error < NETWORK
    assert len(outcome.layers.formats) == len(FORMATS)
    assert "normalised actions differ by" in outcome.summary and "tokens" not in outcome.summary
    manifest = Manifest.load(folder / "engine")
    assert manifest.to_json()["actions"]["tiny"]["chunk"] == CHUNK
    figures = bench(folder / "engine", [folder / "engine16"], repeats=2, threads=1)
    assert list(figures.engine.stages) == ["preprocess", "vision", "decide", "action"] and "decide" in report(figures)
    assert figures.engine.stages["action"].count == 2


def test_the_cost_of_a_layer_is_that_of_its_one_pass(folder: Path) -> None:
    runs = runs_per_action(PolicyConfig.load(folder / "policy"))
    assert runs["proprio_projector.fc2"] == (Runs(1),)
    assert runs["action_head.model.fc1"] == (Runs(CHUNK),)
    sequence = 2 * 4 + 1 + PROMPT_TOKENS + CHUNK * DIM + 1
    assert runs["language_model.model.layers.1.mlp.up_proj"] == (Runs(sequence),)


def test_an_a100_engine_is_built_without_a_gpu(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds sm_80 engines anywhere once it is installed")
    out, four = tmp_path / "engine", rtn(Format(4, 16, 64))
    manifest = build(Request(folder / "policy", find_target("a100"), out, uniform=four, legalize=True))
    assert verify(tmp_path / "engine", folder / "policy", None).reference is None
    assert {call: spec.graph for call, spec in manifest.program.items()} == {"vision": "vision", "decide": "decoder"}
    assert manifest.program["decide"].sizes == {"rows": Range(24, 52, 150, (54, 86, 118, 150))}
