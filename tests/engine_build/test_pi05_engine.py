"""Engines of pi0.5 and pi0 policies: three graphs, the loop outside of them, the same numbers as torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from pi05_policy import INSTRUCTIONS, KEY, PI0, tiny_pi05_folder
from ragged import mixed_assignment, write_plan
from rounding import NETWORK

from calibrator.families import TorchActor
from calibrator.modules.chain import Runs
from calibrator.quantizers import quantize_policy
from engine_build import exported
from engine_build.bench import bench
from engine_build.build import Request, build
from engine_build.costs import PROMPT_TOKENS, runs_per_action
from engine_build.verify import States, verify
from engine_build.weights import layers_of
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import FULL
from vla_policy.core.manifest import Manifest
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.program import Range
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import find_target

HORIZON, DIM, STEPS = 4, 3, 3
FORMATS = ["w2a16_g32", "w4a16_g32", "w8a16_g32", "w16a16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a pi0.5 policy with the state in its prompt."""
    return material(tmp_path_factory.mktemp("pi05_engine"))


@pytest.fixture(scope="module")
def pi0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a pi0 policy."""
    return material(tmp_path_factory.mktemp("pi0_engine"), **PI0)


@pytest.fixture(params=["folder", "pi0"])
def either(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def material(made: Path, **changes: Any) -> Path:
    """`policy` of two images and a state, `plan.json`, and the engines `engine` and `engine16`."""
    policy = tiny_pi05_folder(made / "policy", images=2, **changes)
    assignment = mixed_assignment(list(layers_of(PolicyConfig.load(policy))), FORMATS)
    plan = write_plan(made / "plan.json", sha256_policy(policy), assignment)
    build(Request(policy, find_target("cpu"), made / "engine", plan=plan))
    build(Request(policy, find_target("cpu"), made / "engine16", uniform=FULL))
    return made


def observation(seed: int) -> Observation:
    rng = np.random.default_rng(seed)
    image, wrist = rng.integers(0, 256, (2, 40, 30, 3), dtype=np.uint8)
    return Observation(image, INSTRUCTIONS[seed % 3], rng.uniform(0, 0.1, 2).astype(np.float32), (wrist,))


def test_actions_equal_the_torch_policy_s(either: Path) -> None:
    for name in ("engine", "engine16"):
        engine, actor = load_engine(either / name, threads=1), TorchActor.load(either / "policy")
        if name == "engine":
            quantize_policy(actor.policy, mixed_assignment(list(layers_of(engine.config)), FORMATS))
        for seed in range(3):
            expected, (got, timings) = actor.act(observation(seed)), engine.decide(observation(seed))
            assert got.action.shape == (HORIZON, DIM) and got.tokens.size == 0
            assert [call for call, _ in timings.calls] == ["vision", "prefix", *["step"] * STEPS]
            # Every step's rounding goes into all that follow.
            np.testing.assert_allclose(
                got.action, expected.action, atol=STEPS * NETWORK * np.abs(expected.action).max()
            )


def test_image_words_state_and_noise_matter(folder: Path) -> None:
    engine, seen = load_engine(folder / "engine16", threads=1), observation(0)
    usual = engine.policy.inputs(seen)
    action = engine.policy.decide(engine.program(), usual).action
    changes = {
        "pixel_values": -usual["pixel_values"],
        "input_ids": usual["input_ids"][:, :-1],
        "noise": -usual["noise"],
    }
    for name, value in changes.items():
        other = engine.policy.decide(engine.program(), {**usual, name: value}).action
        assert np.abs(other - action).max() > 1e-3, name
    hotter = Observation(seen.image, seen.instruction, np.array([0.9, 0.09], np.float32), seen.further)
    assert not np.array_equal(engine.policy.inputs(hotter)["input_ids"], usual["input_ids"])


def test_the_state_of_pi0_enters_every_step_and_not_the_prompt(pi0: Path) -> None:
    engine, seen = load_engine(pi0 / "engine16", threads=1), observation(0)
    usual, step = engine.policy.inputs(seen), engine.manifest.graphs["step"]
    assert [spec.shape for spec in step.inputs if spec.name == "state"] == [(1, 1, 6)]
    hotter = Observation(seen.image, seen.instruction, np.array([0.9, 0.09], np.float32), seen.further)
    other = engine.policy.inputs(hotter) | {"noise": usual["noise"]}
    assert [name for name in usual if not np.array_equal(usual[name], other[name])] == ["state"]
    first, second = (engine.policy.decide(engine.program(), inputs).action for inputs in (usual, other))
    assert np.abs(first - second).max() > 1e-3
    changes = {"pixel_values": -usual["pixel_values"], "input_ids": usual["input_ids"][:, :-1],
               "noise": -usual["noise"]}  # fmt: skip
    for name, value in changes.items():
        assert np.abs(engine.policy.decide(engine.program(), {**usual, name: value}).action - first).max() > 1e-3, name


def test_pi0_is_verified_and_costs_a_row_more_than_its_chunk(pi0: Path) -> None:
    outcome = verify(pi0 / "engine", pi0 / "policy", States(None, samples=2)).reference
    assert outcome is not None and outcome.layers is not None
    assert outcome.same_formats.scores_error < STEPS * NETWORK and len(outcome.layers.formats) == len(FORMATS)
    runs = runs_per_action(PolicyConfig.load(pi0 / "policy"))
    expert = "paligemma_with_expert.gemma_expert.model.layers.1"
    assert runs[f"{expert}.mlp.up_proj"] == (Runs(HORIZON + 1, STEPS),)
    assert runs["state_proj"] == (Runs(1, STEPS),)
    assert runs["action_out_proj"] == runs["action_time_mlp_in"] == (Runs(HORIZON, STEPS),)


def test_it_is_verified_and_measured_like_any_other(folder: Path) -> None:
    outcome = verify(folder / "engine", folder / "policy", States(None, samples=2)).reference
    assert outcome is not None and outcome.layers is not None
    assert outcome.same_formats.equal_tokens is None and outcome.same_formats.scores_error < STEPS * NETWORK
    assert len(outcome.layers.formats) == len(FORMATS)
    manifest = Manifest.load(folder / "engine")
    assert manifest.to_json()["actions"][KEY]["chunk"] == HORIZON
    assert {call: spec.graph for call, spec in manifest.program.items()} == {
        "vision": "vision", "prefix": "prefix", "step": "step"
    }  # fmt: skip
    assert manifest.program["step"].sizes == {"rows": Range(9, 56, 208)}
    figures = bench(folder / "engine", [folder / "engine16"], repeats=2, threads=1)
    assert figures.engine.stages["step"].count == 2 * STEPS


def test_the_engine_holds_one_copy_of_the_weights_and_a_table_for_the_time(folder: Path) -> None:
    names = [
        tensor.name
        for graph in ("vision", "prefix", "step")
        for tensor in onnx.load(str(folder / f"engine16/{graph}.onnx"), load_external_data=False).graph.initializer
    ]
    named = [name for name in names if not name.startswith("constant_")]
    assert len(named) == len(set(named))
    assert "step_table" in named and not any("time_mlp" in name or ".dense." in name for name in named)


@pytest.mark.parametrize(
    ("missing", "horizon", "message"),
    [
        ("noise.npy", 4, r"noise\.npy: no such file; import the checkpoint again"),
        ("tokenizer.json", 4, r"tokenizer\.json: no such file; a policy folder needs its tokenizer"),
        (None, 6, r"noise\.npy: float32 \[64, 4, 5\], expected float32 \[entries, 6, 5\]"),
    ],
)
def test_what_the_robot_would_refuse_is_not_built(
    missing: str | None, horizon: int, message: str, tmp_path: Path
) -> None:
    policy = tiny_pi05_folder(tmp_path / "policy")
    raw = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(raw | {"chunk_size": horizon}))
    if missing is not None:
        (policy / missing).unlink()
    with pytest.raises(ArtefactError, match=message):
        build(Request(policy, find_target("cpu"), tmp_path / "engine", uniform=FULL))
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_the_cost_of_a_layer_counts_every_step(folder: Path) -> None:
    runs = runs_per_action(PolicyConfig.load(folder / "policy"))
    assert runs["action_out_proj"] == (Runs(HORIZON, STEPS),)
    expert = "paligemma_with_expert.gemma_expert.model.layers.1"
    assert runs[f"{expert}.mlp.up_proj"] == runs[f"{expert}.self_attn.k_proj"] == (Runs(HORIZON, STEPS),)
    prefix = "paligemma_with_expert.paligemma.model.language_model.layers"
    assert runs[f"{prefix}.2.self_attn.k_proj"] == (Runs(8 + PROMPT_TOKENS),)
    assert f"{prefix}.2.self_attn.q_proj" not in runs, "of the last block only keys and values are read"


def test_its_three_graphs_are_built_for_an_a100_without_a_gpu(either: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds sm_80 engines anywhere once it is installed")
    policy, plan = either / "policy", either / "plan.json"
    manifest = build(Request(policy, find_target("a100"), tmp_path / "engine", plan=plan, legalize=True))
    assert {spec.file for spec in manifest.graphs.values()} == {"vision.engine", "prefix.engine", "step.engine"}
    assert {unit.planned for unit in manifest.units} >= {"w2a16_g32", "w4a16_g32", "w16a16"}
    found = verify(tmp_path / "engine", policy, None)
    _, graphs = exported.load(tmp_path / "engine")
    stand = {name for graph in graphs.values() for name, tensor in graph.tensors.items() if tensor.found}
    assert stand >= {f"{unit.name}.codes" for unit in manifest.units if unit.planned != "w16a16"}
    # Counted as not compared: attention's scale is merged into queries of 16 bits, and a norm's weights, which the time
    # does not modulate, into the one matrix that reads it.
    merged = ("q_proj.weight",) if manifest.config.adaptive else ("q_proj.weight", "action_out_proj.weight")
    whole = {f"{unit.name}.weight" for unit in manifest.units if unit.planned == "w16a16"}
    assert not [name for name in whole - stand if not name.endswith(merged)]
    assert found.tensors == sum(len(graph.tensors) for graph in graphs.values()) and not found.ran_on_target
