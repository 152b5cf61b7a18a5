"""OpenVLA-OFT: its forward pass, its objective and its sensitivity against computations written out by hand."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from choices import CHOICES, W2, W8
from fake_source import FakeSource
from naive import ATTRIBUTION, MASS, naive_losses
from rounding import NETWORK, SINGLE
from safetensors.torch import load_file, save_file
from tiny import INSTRUCTIONS, overflowing_policy_folder, tiny_policy_folder
from torch import Tensor

from calibrator.__main__ import main
from calibrator.data.calibration import collect, load_calibration
from calibrator.families import TorchActor, live_units, load_policy
from calibrator.families.openvla_oft import ChunkDecisions, OpenVLAOFT
from calibrator.modules.prismatic import Prismatic
from calibrator.sensitivity.passes import signals
from calibrator.sensitivity.proxy import first_order
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec
from calibrator.sensitivity.table import Sensitivity
from engine_build.__main__ import main as engine_main
from vla_policy.core.errors import DataError, EngineError, PolicyError
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig

CHUNK, DIM = 4, 3
SIZE = CHUNK * DIM


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SweepSpec:
    """Two images, a state, four actions per decision."""
    folder = tmp_path_factory.mktemp("oft")
    policy = tiny_policy_folder(folder / "policy", images=2, chunk=CHUNK)
    collect([FakeSource((4, 3), images=2)], folder / "calibration", count=4, seed=0)
    return SweepSpec(str(policy), str(folder / "calibration"), SweepSettings(CHOICES), batch_size=3)


@pytest.fixture(scope="module")
def sweep(spec: SweepSpec) -> Sweep:
    return spec.open()


# --- the forward pass, in NumPy and one position at a time -----------------------------------------------------------


def layer_norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0.0)


def rotated(x: np.ndarray, position: int) -> np.ndarray:
    half = len(x) // 2
    angles = position / 10000.0 ** (np.arange(half) / half)
    first, second = x[:half], x[half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    )


def written_out(weights: dict[str, np.ndarray], patches: np.ndarray, ids: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Normalised actions [H K] of the architecture that the OpenVLA-OFT paper describes."""
    table = weights["language_model.model.embed_tokens.weight"]
    hidden_1 = linear(state, weights, "proprio_projector.fc1")
    activated = np.asarray([0.5 * v * (1 + float(torch.erf(torch.tensor(v / 2**0.5)))) for v in hidden_1])
    embedded = linear(activated, weights, "proprio_projector.fc2")
    empty = np.zeros_like(table[0])
    rows = [table[ids[0]], *patches, embedded, *table[ids[1:]], *[empty] * SIZE, table[2]]
    heads, width = 2, len(empty)
    size = width // heads
    for index in range(2):
        name = f"language_model.model.layers.{index}"

        def norm(x: np.ndarray, which: str, name: str = name) -> np.ndarray:
            return x / np.sqrt((x**2).mean() + 1e-6) * weights[f"{name}.{which}.weight"]

        normed = [norm(x, "input_layernorm") for x in rows]
        q, k, v = ([linear(x, weights, f"{name}.self_attn.{p}_proj") for x in normed] for p in "qkv")
        mixed = []
        for here in range(len(rows)):
            parts = []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                query = rotated(q[here][part], here)
                scores = np.asarray([query @ rotated(k[t][part], t) for t in range(len(rows))]) / size**0.5
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                parts.append(sum(share * value[part] for share, value in zip(shares, v, strict=True)))
            mixed.append(np.concatenate(parts))
        rows = [x + linear(m, weights, f"{name}.self_attn.o_proj") for x, m in zip(rows, mixed, strict=True)]
        for here, x in enumerate(rows):
            y = norm(x, "post_attention_layernorm")
            gate, up = (linear(y, weights, f"{name}.mlp.{p}_proj") for p in ("gate", "up"))
            rows[here] = x + linear(gate / (1 + np.exp(-gate)) * up, weights, f"{name}.mlp.down_proj")
    final = [x / np.sqrt((x**2).mean() + 1e-6) * weights["language_model.model.norm.weight"] for x in rows]
    head = "action_head.model"
    last_prompt = len(patches) + 1 + len(ids) - 1  # behind BOS, patches and state
    actions = []
    for step in range(CHUNK):
        x = np.concatenate(final[last_prompt + step * DIM : last_prompt + (step + 1) * DIM])
        x = np.maximum(linear(layer_norm(x, weights, f"{head}.layer_norm1"), weights, f"{head}.fc1"), 0)
        for block in range(2):
            name = f"{head}.mlp_resnet_blocks.{block}.ffn"
            x = x + np.maximum(linear(layer_norm(x, weights, f"{name}.0"), weights, f"{name}.1"), 0)
        actions.append(linear(layer_norm(x, weights, f"{head}.layer_norm2"), weights, f"{head}.fc2"))
    return np.concatenate(actions)


def test_a_decision_equals_the_architecture_written_out(sweep: Sweep) -> None:
    policy = sweep.policy
    weights = {name: tensor.double().numpy() for name, tensor in policy.state_dict().items()}
    inputs = sweep.states.inputs(policy, (1,))
    assert "state" in inputs
    patches = policy.patches(inputs["pixel_values"])[0].double().numpy()
    expected = written_out(weights, patches, inputs["input_ids"][0].numpy(), inputs["state"][0].double().numpy())
    decided = policy.decide(inputs, SIZE)
    np.testing.assert_allclose(decided[0].numpy(), expected, atol=NETWORK * np.abs(expected).max())
    np.testing.assert_allclose(sweep.reference.decided[1], expected, atol=NETWORK * np.abs(expected).max())


def test_an_action_is_un_normalised_as_published(sweep: Sweep, spec: SweepSpec) -> None:
    actor = TorchActor.load(spec.policy)
    observation = sweep.states.calibration.observation(2)
    decision = actor.act(observation)
    values = sweep.reference.decided[2].reshape(CHUNK, DIM).astype(np.float64)
    low, high = np.array([-1, -0.5]), np.array([1, 0.5])
    expected = np.concatenate([0.5 * (values[:, :2] + 1) * (high - low + 1e-8) + low, values[:, 2:]], axis=1)
    assert decision.action.shape == (CHUNK, DIM) and decision.tokens.size == 0
    # The reference was decided in a batch of three, the action alone: other products, the same but for rounding.
    np.testing.assert_allclose(decision.action, expected, atol=NETWORK * np.abs(values).max())
    exact = sweep.states.decisions.decision(sweep.reference.decided[2]).action  # float64, a handful of roundings
    np.testing.assert_allclose(exact, expected, rtol=1e-14, atol=1e-15)
    with pytest.raises(DataError, match="state: expected 2 finite values"):
        actor.act(Observation(observation.image, INSTRUCTIONS[0], None, observation.further))


def test_a_policy_that_overflows_decides_nothing_and_is_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are finite, and most states are answered; the reference pass over all ends in one line."""
    policy, calibration = overflowing_policy_folder(tmp_path / "policy"), tmp_path / "calibration"
    actor, image = TorchActor.load(policy), np.zeros((32, 32, 3), np.uint8)
    near, far = (Observation(image, INSTRUCTIONS[0], np.array(state, np.float32)) for state in ((0, 0), (1, 0.1)))
    assert actor.act(near).action.shape == (CHUNK, DIM)
    with pytest.raises(EngineError, match="torch policy: normalised actions: 12 of 12 values are not finite"):
        actor.act(far)
    collect([FakeSource((9, 9, 9))], calibration, count=27, seed=0)
    assert any(2 * state @ [0.5, 10] - 1 > 0.35 for state in load_calibration(calibration).states)
    command = ["sensitivity", "--policy", str(policy), "--calibration", str(calibration), "--choices", "w8a16:rtn"]
    assert main([*command, "--out", str(tmp_path / "sensitivity.json")]) == 2
    captured = capsys.readouterr().err.strip().splitlines()[-1]
    assert captured.startswith("error: torch policy: normalised actions: ")


# --- the objective ---------------------------------------------------------------------------------------------------


def by_the_formula(actions: np.ndarray, decided: np.ndarray) -> float:
    """<v, a - m> / <v, a* - m>, v = (a* - m) / s^2; m of the gripper is its threshold."""
    means = [0.1, -0.1, 0.5]  # of the statistics -1 .. 1 and -0.5 .. 0.5 in normalised units
    deviations = [0.4, 0.4, 0.5]
    above = below = 0.0
    for row, wanted in zip(actions.reshape(CHUNK, DIM), decided.reshape(CHUNK, DIM), strict=True):
        for k in range(DIM):
            v = (wanted[k] - means[k]) / deviations[k] ** 2
            above += v * (row[k] - means[k])
            below += v * (wanted[k] - means[k])
    return above / below


def test_the_objective_is_one_for_the_decision_and_has_a_gradient_there(sweep: Sweep) -> None:
    decided = sweep.reference.decided[:2].astype(np.float64)
    other = decided + np.random.default_rng(0).normal(size=decided.shape)
    decisions = sweep.states.decisions
    for actions in (decided, other):
        output = torch.from_numpy(actions).float().requires_grad_()
        value = decisions.objective(output, torch.from_numpy(decided).float())
        expected = [by_the_formula(*pair) for pair in zip(actions, decided, strict=True)]
        # Sums of twelve products of either sign, some of which nearly cancel: 16 u times what they cancel by, up to 10.
        np.testing.assert_allclose(value.detach().numpy(), expected, rtol=16 * 10 * SINGLE)
        (slope,) = torch.autograd.grad(value.sum(), output)
        assert float(slope.abs().max()) > 1e-3
    exact = decisions.objective(torch.from_numpy(decided), torch.from_numpy(decided))
    torch.testing.assert_close(exact, torch.ones(2), check_dtype=False)
    distance = decisions.error(torch.from_numpy(other), torch.from_numpy(decided))
    np.testing.assert_allclose(distance.numpy(), ((other - decided) ** 2).sum(1), rtol=1e-12)


def test_statistics_without_spread_are_refused(spec: SweepSpec) -> None:
    raw = json.loads((Path(spec.policy) / "config.json").read_text())
    raw["norm_stats"]["tiny"]["action"]["std"][1] = 0.0
    with pytest.raises(PolicyError, match=r"std \[0.4, 0.0, 0.5\] must be above zero"):
        ChunkDecisions.of(PolicyConfig.from_dict(raw, "config.json"), None)
    del raw["norm_stats"]["tiny"]["action"]["std"]
    with pytest.raises(PolicyError, match=r"norm_stats.tiny.action: mean and std are missing"):
        ChunkDecisions.of(PolicyConfig.from_dict(raw, "config.json"), None)


# --- sensitivity -----------------------------------------------------------------------------------------------------

UNITS = (
    "vision_backbone.fused_featurizer.blocks.0.attn.qkv",
    "projector.fc3",
    "proprio_projector.fc1",
    "language_model.model.layers.0.self_attn.k_proj",
    "language_model.model.layers.1.mlp.gate_proj",
    "action_head.model.fc1",
    "action_head.model.mlp_resnet_blocks.1.ffn.1",
)


@pytest.mark.parametrize("unit", UNITS)
def test_losses_equal_a_naive_recomputation(sweep: Sweep, unit: str) -> None:
    def objective_of(policy: Prismatic, index: int) -> Tensor:
        assert isinstance(policy, OpenVLAOFT)
        inputs, decided = sweep.states.inputs(policy, (index,)), sweep.reference.decided[index]
        model, ids = policy.decoder, inputs["input_ids"]
        words, end = model.embed_tokens(ids), model.embed_tokens(torch.tensor([[2]]))
        state = policy.proprio_projector(inputs["state"])[:, None]
        empty = torch.zeros(1, SIZE, words.shape[2])
        x = torch.cat([words[:, :1], policy.patches(inputs["pixel_values"]), state, words[:, 1:], empty, end], dim=1)
        rotary = model.rotary_emb(x, torch.arange(x.shape[1])[None])
        for layer in model.layers:
            x = layer(x, position_embeddings=rotary)
        actions = policy.action_head(model.norm(x)[:, -SIZE - 2 : -2])[0].flatten()
        means, deviations = np.tile([0.1, -0.1, 0.5], CHUNK), np.tile([0.4, 0.4, 0.5], CHUNK)
        v = (decided - means) / deviations**2
        scale = float(v @ (decided - means))
        return sum((actions[i] - means[i]) * v[i] / scale for i in range(SIZE))

    losses = sweep.evaluate(unit, (W2,), tuple(range(4)))
    expected = np.asarray(naive_losses(sweep, unit, W2, objective_of, slice(-SIZE - 2, -2)))
    np.testing.assert_allclose(losses.mass[0], expected[..., 0], **MASS)
    np.testing.assert_allclose(losses.attribution[0], expected[..., 1], **ATTRIBUTION)
    assert losses.mass.max() > 1e-3 and losses.action_error.max() > 0


@pytest.mark.parametrize("unit", UNITS)
def test_every_entry_gives_the_full_precision_signals(sweep: Sweep, unit: str) -> None:
    trunk, reference = sweep.full_precision(sweep.states.split(range(4))[0])
    entered = signals(trunk, sweep.units[unit].segment)
    for name, hidden in reference.hidden.items():
        for got, full in ((entered.hidden[name], hidden), (entered.gradients[name], reference.gradients[name])):
            torch.testing.assert_close(got, full, rtol=0, atol=NETWORK * float(full.abs().max()))
    torch.testing.assert_close(entered.objective, torch.ones_like(entered.objective), rtol=0, atol=16 * SINGLE)


def test_the_first_order_action_error_is_the_bound_that_it_claims_to_be(sweep: Sweep) -> None:
    """The actions are linear in the head's last layer. Norms over tokens do not tell which of the chunk's rows moved
    which action, so the bound exceeds the change by exactly their number there."""
    unit = "action_head.model.fc2"
    exact = sweep.evaluate(unit, (W8,), tuple(range(4))).action_error[0]
    position = sweep.settings.choices.index(W8)
    (estimate,) = first_order(sweep, [unit], evidence=False)
    np.testing.assert_allclose(estimate.action[position], CHUNK * exact, rtol=1e-3)


def test_eight_bits_of_the_last_layer_move_the_evidence_mass_as_predicted(sweep: Sweep) -> None:
    """It changes no activation at a boundary, and the gradient that arrives at it is a constant."""
    unit = "action_head.model.fc2"
    (found,) = first_order(sweep, [unit], evidence=True)
    exact = sweep.evaluate(unit, (W8,), tuple(range(4))).mass[0]
    predicted = np.abs(found.mass[sweep.settings.choices.index(W8)])
    assert exact.mean(0).min() > 1e-5
    assert (np.abs(predicted - exact).mean(0) < 0.15 * exact.mean(0)).all()


def test_layers_and_their_cost(sweep: Sweep) -> None:
    names = [unit.name for unit in live_units(sweep.policy)]
    assert "language_model.lm_head" not in names
    rows = {unit.name: unit.tokens(prompt_tokens=10, decided=SIZE) for unit in live_units(sweep.policy)}
    assert rows["language_model.model.layers.0.mlp.up_proj"] == 8 + 1 + 10 + SIZE + 1
    assert (rows["proprio_projector.fc1"], rows["action_head.model.fc1"], rows["projector.fc1"]) == (1, CHUNK, 8)
    stages = {unit.name: unit.stage for unit in live_units(sweep.policy)}
    assert (stages["proprio_projector.fc2"], stages["action_head.model.fc2"]) == ("projector", "head")


def test_from_the_published_files_to_an_engine(spec: SweepSpec, tmp_path: Path) -> None:
    """import-oft, sensitivity, allocate, build and verify as a user calls them."""
    published = publish(Path(spec.policy), tmp_path / "published")
    policy, scores, plan = tmp_path / "policy", tmp_path / "sensitivity.json", tmp_path / "plan.json"
    assert main(import_command(published, policy, STATED)) == 0
    expected = load_policy(spec.policy).state_dict()
    loaded = load_policy(policy)
    assert isinstance(loaded, OpenVLAOFT) and not list(policy.glob("*.pt"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    calibration = ["--policy", str(policy), "--calibration", spec.calibration]
    assert main(["sensitivity", *calibration, "--choices", "w2a16_g32", "w4a16_g32", "--out", str(scores)]) == 0
    assert {unit.name for unit in Sensitivity.load(scores).units} == {unit.name for unit in live_units(loaded)}
    assert main(["allocate", "--sensitivity", str(scores), "--average-bits", "4", "--out", str(plan)]) == 0
    engine = tmp_path / "engine"
    build = ["build", "--policy", str(policy), "--plan", str(plan), "--target", "cpu", "--out", str(engine)]
    assert engine_main(build) == 0
    assert engine_main(["verify", str(engine), "--policy", str(policy), "--calibration", spec.calibration]) == 0


def publish(policy: Path, folder: Path) -> Path:
    """The policy as OpenVLA-OFT publishes one: pickled parts, statistics apart, a language head that never runs."""
    folder.mkdir()
    tensors = load_file(policy / "model.safetensors")
    raw = json.loads((policy / "config.json").read_text())
    for prefix, module in (("action_head.", "module."), ("proprio_projector.", "")):
        part = {module + n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
        torch.save(part, folder / f"{prefix[:-1]}--150000_checkpoint.pt")
    vocab, width = tensors["language_model.model.embed_tokens.weight"].shape
    tensors["language_model.lm_head.weight"] = torch.zeros(vocab, width)
    save_file(tensors, folder / "model.safetensors")
    statistics = raw.pop("norm_stats")
    statistics["tiny"]["proprio"].pop("names")
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    for name in ("num_actions_chunk", "num_images_in_input", "use_proprio", "state_in_prompt", "steps_per_action"):
        raw.pop(name)
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "openvla", "norm_stats": {}}))
    (folder / "tokenizer.json").write_bytes((policy / "tokenizer.json").read_bytes())
    return folder


class Harmful:
    """What a pickle may do when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path, ("executed",)


HARMFUL = pickle.dumps(Harmful(), protocol=2)


def diffuse(folder: Path) -> None:
    """The parts of a policy whose action head denoises."""
    torch.save({"noise_predictor.mlp_resnet.fc1.weight": torch.zeros(2, 2)}, next(folder.glob("action_head*")))


def statistics_without_percentiles(folder: Path) -> None:
    path = folder / "dataset_statistics.json"
    raw = json.loads(path.read_text())
    for part in raw["tiny"].values():
        part["min"], part["max"] = part.pop("q01"), part.pop("q99")
    path.write_text(json.dumps(raw))


STATED = {
    "--chunk": ["4"],
    "--images": ["2"],
    "--normalization": ["bounds_q99"],
    "--state-names": ["x", "gripper_width"],
}


def import_command(published: Path, policy: Path, stated: dict[str, list[str]]) -> list[str]:
    options = [word for option, values in stated.items() for word in (option, *values)]
    return ["import-oft", "--checkpoint", str(published), "--out", str(policy), *options]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: next(folder.glob("action_head*")).unlink(), "no action_head--*_checkpoint.pt"),
        (lambda folder: (folder / "action_head--9_checkpoint.pt").touch(), "several action_head files"),
        (lambda folder: next(folder.glob("action_head*")).write_bytes(b"no pickle"), "damaged, or holds more than"),
        (lambda folder: next(folder.glob("action_head*")).write_bytes(HARMFUL), "more than tensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (diffuse, "'action_head.noise_predictor.mlp_resnet.fc1.weight' does not belong"),
        (lambda folder: (folder / "noisy_action_projector--9_checkpoint.pt").touch(), "noisy_action_projector--9_che"),
        (lambda folder: (folder / "vision_backbone--9_checkpoint.pt").touch(), "vision_backbone--9_checkpoint.pt "),
        (lambda folder: (folder / "lora_adapter").mkdir(), "lora_adapter would be left out of the policy"),
        (lambda folder: (folder / "adapter_config.json").touch(), "adapter_config.json would be left out"),
        (statistics_without_percentiles, "norm_stats.tiny.action: 'q01' is missing, which 'bounds_q99' normalises by"),
    ],
)
def test_an_import_refuses_with_the_reason(
    spec: SweepSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], message: str
) -> None:
    published = publish(Path(spec.policy), tmp_path / "published")
    damage(published)
    assert main(import_command(published, tmp_path / "policy", STATED)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "policy").exists()


@pytest.mark.parametrize("option", ["--chunk", "--images", "--normalization"])
def test_what_the_files_do_not_say_is_asked(
    spec: SweepSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    published = publish(Path(spec.policy), tmp_path / "published")
    stated = {name: values for name, values in STATED.items() if name != option}
    with pytest.raises(SystemExit, match="2"):
        main(import_command(published, tmp_path / "policy", stated))
    assert f"the following arguments are required: {option}" in capsys.readouterr().err


@pytest.mark.parametrize(("names", "given"), [([], "0 (none)"), (["x", "y", "z"], "3 (x, y, z)")])
def test_every_value_of_the_state_is_named(
    spec: SweepSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], given: str
) -> None:
    published = publish(Path(spec.policy), tmp_path / "published")
    stated = {name: values for name, values in STATED.items() if name != "--state-names"}
    if names:
        stated["--state-names"] = names
    assert main(import_command(published, tmp_path / "policy", stated)) == 2
    assert f"takes a state of 2 values, --state-names gives {given}" in capsys.readouterr().err


def test_an_adapter_beside_merged_weights_is_left_behind_when_that_is_stated(spec: SweepSpec, tmp_path: Path) -> None:
    published = publish(Path(spec.policy), tmp_path / "published")
    (published / "lora_adapter").mkdir()
    assert main(import_command(published, tmp_path / "policy", STATED | {"--lora-merged": []})) == 0
    assert isinstance(load_policy(tmp_path / "policy"), OpenVLAOFT)


def test_minimum_and_maximum_reach_the_action(spec: SweepSpec, tmp_path: Path) -> None:
    """The choice is recorded: what is loaded afterwards computes with it. Oracle: the same network on the state that
    the other statistics would have normalised alike, its normalised values scaled by hand."""
    published = publish(Path(spec.policy), tmp_path / "published")
    statistics = json.loads((published / "dataset_statistics.json").read_text())
    action, proprio = statistics["tiny"]["action"], statistics["tiny"]["proprio"]
    action |= {"min": [-3.0, -2.0, -1.0], "max": [5.0, 2.0, 1.0]}
    proprio |= {"min": [-2.0, -1.0], "max": [2.0, 1.0]}
    (published / "dataset_statistics.json").write_text(json.dumps(statistics))
    policy = tmp_path / "policy"
    assert main(import_command(published, policy, STATED | {"--normalization": ["bounds"]})) == 0
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    state, alike = np.array([1.0, 0.5], np.float32), np.array([0.5, 0.075], np.float32)  # both are 0.5, 0.5
    got = TorchActor.load(policy).act(Observation(image, INSTRUCTIONS[0], state, (image,))).action
    other = TorchActor.load(spec.policy).act(Observation(image, INSTRUCTIONS[0], alike, (image,))).action
    values = other[:, :2] / [1.0, 0.5]  # its limits are -1 to 1 and -0.5 to 0.5
    # The two states are equal to float32's rounding, which the network carries on; an action's unit is up to 4 of its.
    noise = NETWORK * np.abs(other).max()
    np.testing.assert_allclose(got[:, :2], 0.5 * (values + 1) * [8.0, 4.0] + [-3.0, -2.0], atol=4 * 2 * noise)
    np.testing.assert_allclose(got[:, 2], other[:, 2], atol=noise)
