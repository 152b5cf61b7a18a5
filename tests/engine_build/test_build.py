"""Policy and plan to engine: same numbers as the torch policy, same bytes every time, and refusals in one line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from choices import rtn
from ragged import build_engine, observation, write_policy
from rounding import NETWORK, assert_clear
from safetensors.torch import load_file, save_file
from tiny import overflowing_policy_folder, tiny_policy_folder

from calibrator.families import TorchActor
from calibrator.quantizers import parse_choice, quantize_policy, quantized
from engine_build.__main__ import main
from engine_build.backends import find_backend
from engine_build.backends.onnxruntime.linear import linear
from engine_build.build import Request, build
from engine_build.graph.builder import GraphBuilder
from engine_build.plan import load_plan
from engine_build.weights import LayerWeights, layers_of
from vla_policy.core.cli import run
from vla_policy.core.errors import ArtefactError, DataError, EngineError, PolicyError, VlaError
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import FULL, Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.observation import Observation
from vla_policy.core.prismatic.config import PrismaticConfig
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import find_target

CPU = find_target("cpu")


def simulated(folder: Path) -> TorchActor:
    """The torch policy with the plan's weights rounded in place."""
    actor = TorchActor.load(folder / "policy")
    layers = layers_of(actor.config)
    quantize_policy(actor.policy, load_plan(folder / "plan.json", sha256_policy(folder / "policy"), layers).assignment)
    return actor


def logits(actor: TorchActor, seen: Observation, tokens: np.ndarray) -> np.ndarray:
    """Of the action tokens, from the whole head."""
    inputs = actor.policy.tensors([actor.robot.inputs(seen)])
    assert isinstance(actor.config, PrismaticConfig)
    last = actor.config.text.vocab_size - actor.config.pad_to_multiple_of
    return actor.policy.output(inputs, torch.from_numpy(tokens)[None])[0, :, last - 256 : last].numpy()


@pytest.mark.parametrize(
    ("formats", "noise"),
    [
        (["w16a16"], NETWORK),
        (["w2a16_g32", "w4a16_g32", "w8a16_g32", "w16a16"], NETWORK),
        (["w2a16", "w4a16_g64", "w8a16"], NETWORK),
        # A code that falls on the other side of .5 moves an activation by 1/127 of its token's peak, in every layer.
        (["w8a8"], 0.08),
    ],
)
def test_engine_equals_the_torch_policy(formats: list[str], noise: float, tmp_path: Path) -> None:
    engine = load_engine(build_engine(tmp_path, formats), threads=1)
    actor = simulated(tmp_path)
    for seed in range(4):
        seen = observation(seed)
        decision = actor.act(seen)
        got = engine.scores(seen, decision)
        expected = logits(actor, seen, decision.tokens)
        np.testing.assert_allclose(got, expected, atol=noise * np.abs(expected).max())
        if noise == NETWORK:
            assert_clear(actor.scores(seen, decision.tokens))
            served = engine.act(seen)
            np.testing.assert_array_equal(served.tokens, decision.tokens)
            np.testing.assert_array_equal(served.action, decision.action)


def test_an_engine_of_two_images_equals_the_torch_policy(tmp_path: Path) -> None:
    engine = load_engine(build_engine(tmp_path, ["w4a16_g32", "w8a16_g32", "w16a16"], images=2), threads=1)
    actor = simulated(tmp_path)
    for seed in range(2):
        seen = observation(seed, images=2)
        decision = actor.act(seen)
        got = engine.scores(seen, decision)
        expected = logits(actor, seen, decision.tokens)
        np.testing.assert_allclose(got, expected, atol=NETWORK * np.abs(expected).max())
        assert_clear(actor.scores(seen, decision.tokens))
        np.testing.assert_array_equal(engine.act(seen).tokens, decision.tokens)
    with pytest.raises(DataError, match="the policy looks at 2, got 1"):
        engine.act(observation())


@pytest.mark.parametrize("kind", ["tokens", "chunk"])
def test_the_allowance_for_rounding_lies_between_rounding_and_a_defect(kind: str, tmp_path: Path) -> None:
    """`rounding.NETWORK`, by which engines, batches and caches are compared, is neither chance nor blindness."""
    folder = write_policy(tmp_path / kind) if kind == "tokens" else tiny_policy_folder(tmp_path / kind, chunk=4)
    actor, exact = TorchActor.load(folder), TorchActor.load(folder)
    exact.policy.double()
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    seen = observation(0) if kind == "tokens" else Observation(image, "push", np.array([0.3, 0.05], np.float32))
    tokens = actor.act(seen).tokens
    found, expected = actor.scores(seen, tokens), exact.scores(seen, tokens)
    size = np.abs(expected).max()
    assert np.abs(found - expected).max() < NETWORK * size / 4
    for layer in layers_of(actor.config):
        with quantized(actor.policy, layer, parse_choice("w8a16_g32")):
            assert np.abs(actor.scores(seen, tokens) - found).max() > 2 * NETWORK * size, layer


def test_same_inputs_give_the_same_bytes(workshop: Path, tmp_path: Path) -> None:
    build(Request(workshop / "policy", CPU, tmp_path / "again", plan=workshop / "plan.json"))
    assert Manifest.load(tmp_path / "again") == Manifest.load(workshop / "engine")
    for path in (workshop / "engine").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_manifest_counts_every_byte(workshop: Path) -> None:
    manifest = Manifest.load(workshop / "engine")
    totals = manifest.totals()
    on_disk = sum(path.stat().st_size for path in (workshop / "engine").iterdir() if path.name != "manifest.json")
    assert totals["engine_bytes"] == on_disk
    assert totals["code_bytes"] + totals["scale_bytes"] + totals["other_bytes"] == on_disk
    two_bit = [unit for unit in manifest.units if unit.planned == "w2a16_g32" and unit.inputs % 32 == 0]
    assert two_bit
    for unit in two_bit:
        assert unit.code_bytes == unit.weights // 4
        assert unit.scale_bytes == 2 * unit.weights // 32


def test_dead_layers_are_not_in_the_engine(workshop: Path) -> None:
    names = {unit.name for unit in Manifest.load(workshop / "engine").units}
    assert "vision_backbone.featurizer.blocks.1.attn.qkv" in names
    assert not any("blocks.2." in name or "attn_pool" in name for name in names)


def test_a_format_that_was_not_realised_stops_the_build(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets_to_pack(builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
        if weights.quantized is None:
            return linear(builder, x, weights)
        rows = weights.quantized.dequantize().flatten(1)
        return linear(builder, x, replace(weights, format=Format(16, 16), quantized=None, rows=rows))

    backend = find_backend("onnxruntime")
    dialect = replace(backend.dialect(()), linear=forgets_to_pack)
    monkeypatch.setattr(backend, "dialect", lambda version: dialect)
    with pytest.raises(ArtefactError, match="planned as w2a16_g32 but runs as w16a16"):
        build(Request(workshop / "policy", CPU, tmp_path / "engine", plan=workshop / "plan.json"))
    assert list(tmp_path.iterdir()) == []


def damaged_plan(workshop: Path, tmp_path: Path, change: str) -> Path:
    """The workshop's plan with one thing wrong."""
    content = json.loads((workshop / "plan.json").read_text())
    assignment = content["assignment"]
    first = next(iter(assignment))
    if change == "policy":
        content["policy_sha256"] = "0" * 64
    elif change == "unknown":
        assignment["language_model.model.layers.99.mlp.up_proj"] = rtn(Format(4, 16, 32)).to_json()
    elif change == "missing":
        del assignment[first]
    elif change == "recipe":
        assignment[first] = {"format": "w4a16_g32", "recipe": None}
    elif change == "version":
        assignment[first]["recipe"] = {"method": "rtn", "version": 0, "parameters": {}}
    elif change == "old":
        content["schema_version"] = 1
    elif change == "illegal":
        assignment[first] = rtn(Format(4, 4, 32)).to_json()
    elif change == "shape":
        assignment[first] = 4
    path = tmp_path / "plan.json"
    path.write_text("{" if change == "truncated" else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("policy", "made for the policy with sha256 000000000000"),
        ("unknown", r"unknown units: language_model.model.layers.99.mlp.up_proj"),
        ("missing", r"missing units: vision_backbone.featurizer.patch_embed.proj"),
        ("recipe", "choice w4a16_g32: a recipe belongs to weights below 16 bits"),
        ("version", "w2a16_g32:rtn: is of version 0 of rtn, which is now at 1; measure and allocate again"),
        ("old", "expected kind 'plan' version 2, got kind 'plan' version 1; made by another version: make it again"),
        ("illegal", r"1 layers have formats that target cpu cannot run, .*w4a4_g32: no kernel multiplies 4-bit"),
        ("shape", "expected .*got 4"),
        ("truncated", "not valid JSON"),
    ],
)
def test_unusable_plans_are_refused(change: str, message: str, workshop: Path, tmp_path: Path) -> None:
    plan = damaged_plan(workshop, tmp_path, change)
    with pytest.raises(VlaError, match=message):
        build(Request(workshop / "policy", CPU, tmp_path / "engine", plan=plan))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_legalize_raises_formats_and_records_it(workshop: Path, tmp_path: Path) -> None:
    plan = damaged_plan(workshop, tmp_path, "illegal")
    manifest = build(Request(workshop / "policy", CPU, tmp_path / "engine", plan=plan, legalize=True))
    assert len(manifest.legalized) == 1
    assert "w4a4_g32 -> w4a8_g32 (no kernel multiplies 4-bit activations" in manifest.legalized[0]


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "policy")
    weights = policy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ArtefactError, match="damaged or truncated"):
        build(Request(policy, CPU, tmp_path / "engine", uniform=FULL))
    assert not (tmp_path / "engine").exists()


_LAYER, _TOWER = "language_model.model.layers.1", "vision_backbone.featurizer"
_TENSORS = {  # one of each form in which an engine holds numbers
    "language_model.model.embed_tokens.weight": "bfloat16",
    f"{_LAYER}.mlp.down_proj.weight": "bfloat16",
    f"{_LAYER}.input_layernorm.weight": "float32",
    f"{_TOWER}.pos_embed": "float32",
    f"{_TOWER}.patch_embed.proj.bias": "float32",
}


@pytest.mark.parametrize("name", _TENSORS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 3.4e38])
def test_numbers_that_an_engine_cannot_hold_are_refused(name: str, value: float, tmp_path: Path) -> None:
    """3.4e38 is finite in float32, and infinite once it is rounded to bfloat16."""
    policy = write_policy(tmp_path / "policy")
    tensors = load_file(policy / "model.safetensors")
    damaged = tensors[name].float()
    damaged.view(-1)[-1] = value
    save_file(tensors | {name: damaged}, policy / "model.safetensors", metadata={"format": "pt"})
    request = Request(policy, CPU, tmp_path / "engine", uniform=FULL)
    if (value, _TENSORS[name]) == (3.4e38, "float32"):
        build(request)
        return
    with pytest.raises(ArtefactError, match=rf"{name}: holds numbers that are not finite in {_TENSORS[name]}"):
        build(request)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "is not finite"),
        (2e38, r"holds 1.99e\+38; scales are float16, so w4a16_g32 holds at most 4.59e\+05"),
    ],
)
def test_weights_that_codes_cannot_stand_for_are_refused(value: float, message: str, tmp_path: Path) -> None:
    policy, name = write_policy(tmp_path / "policy"), f"{_LAYER}.mlp.down_proj"
    tensors = load_file(policy / "model.safetensors")
    tensors[f"{name}.weight"][3, 7] = value
    save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolicyError, match=f"{name}: weight of shape .* {message}"):
        build(Request(policy, CPU, tmp_path / "engine", uniform=rtn(Format(4, 16, 32))))


def test_an_engine_that_overflows_is_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every weight is finite, and so is most states' arithmetic; what is not ends no command in a traceback."""
    policy, engine = overflowing_policy_folder(tmp_path / "policy"), tmp_path / "engine"
    built = build(Request(policy, CPU, engine, uniform=FULL))
    image = np.zeros((32, 32, 3), np.uint8)
    near, far = (Observation(image, "push", np.array(state, np.float32)) for state in ((0, 0), (1, 0.1)))
    loaded = load_engine(engine, threads=1)
    assert loaded.act(near).action.shape == (4, 3)
    for ask in (loaded.act, lambda seen: loaded.scores(seen, np.zeros(0, np.int64))):
        with pytest.raises(EngineError, match="normalised actions: 12 of 12 values are not finite"):
            ask(far)
    assert run(lambda: main(["verify", str(engine), "--policy", str(policy), "--samples", "8"])) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: torch policy: normalised actions: 12 of 12 values are not finite")
    assert Manifest.load(engine) == built
