"""The sweep against an independent recomputation, and the identities that its shortcuts rest on."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from choices import CHOICES, W2, W4, W8
from naive import ATTRIBUTION, MASS, naive_losses
from rounding import NETWORK, SINGLE
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibrator.families import live_units
from calibrator.families.openvla import OpenVLA, TokenDecisions
from calibrator.families.openvla_oft.model import OpenVLAOFT
from calibrator.modules.chain import PAD
from calibrator.modules.prismatic import Prismatic
from calibrator.quantizers import InputScale, QuantizedWeight, parse_choice, parse_choices, quantize, quantized
from calibrator.quantizers.activations import input_rows
from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.passes import Signals, Trunk, signals
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec
from vla_policy.core.errors import DataError, PolicyError
from vla_policy.core.formats import FULL, Choice, Rounding
from vla_policy.core.observation import check_strays
from vla_policy.core.policy_config import PolicyConfig

UNITS = (
    "vision_backbone.featurizer.patch_embed.proj",
    "vision_backbone.featurizer.blocks.1.mlp.fc2",
    "vision_backbone.fused_featurizer.blocks.0.attn.qkv",
    "projector.fc2",
    "language_model.model.layers.0.self_attn.v_proj",
    "language_model.model.layers.1.mlp.down_proj",
    "language_model.lm_head",
)


def losses_by_loops(sweep: Sweep, unit: str, choice: Choice) -> list[list[tuple[float, float]]]:
    """(mass, attribution) per state and boundary, with J by an explicit sum over the action tokens."""
    count = sweep.states.decisions.size

    def objective_of(policy: Prismatic, index: int) -> Tensor:
        assert isinstance(policy, OpenVLA)
        inputs, tokens = sweep.states.inputs(policy, (index,)), torch.from_numpy(sweep.reference.decided[index])
        ids = torch.cat([inputs["input_ids"], tokens[None, :-1]], dim=1)
        hidden = policy.hidden(policy.embed(ids, policy.patches(inputs["pixel_values"])))
        logits = policy.language_model.lm_head(hidden[:, -count:])
        objective = torch.zeros(())
        for k in range(count):
            objective = objective + torch.log(torch.softmax(logits[0, k], 0)[tokens[k]]) / count
        return objective

    return naive_losses(sweep, unit, choice, objective_of, slice(-count, None))


@pytest.mark.parametrize("unit", UNITS)
def test_losses_equal_a_naive_recomputation(sweep: Sweep, unit: str) -> None:
    losses = sweep.evaluate(unit, (W2, W8), tuple(range(8)))
    for row, choice in enumerate((W2, W8)):
        expected = np.asarray(losses_by_loops(sweep, unit, choice))
        np.testing.assert_allclose(losses.mass[row], expected[..., 0], **MASS)
        np.testing.assert_allclose(losses.attribution[row], expected[..., 1], **ATTRIBUTION)
    assert losses.mass[0].max() > 1e-3, "the comparison would say nothing if two bits changed nothing"


@pytest.mark.parametrize("unit", UNITS[:3])
def test_losses_over_two_images_equal_a_naive_recomputation(two_images: SweepSpec, unit: str) -> None:
    sweep = two_images.open()
    losses = sweep.evaluate(unit, (W2,), tuple(range(4)))
    expected = np.asarray(losses_by_loops(sweep, unit, W2))
    np.testing.assert_allclose(losses.mass[0], expected[..., 0], **MASS)
    np.testing.assert_allclose(losses.attribution[0], expected[..., 1], **ATTRIBUTION)


def test_each_image_has_its_own_patches(two_images: SweepSpec) -> None:
    """The patches of both images are those of each alone, first image first; a decision depends on the order."""
    sweep = two_images.open()
    policy, inputs = sweep.policy, sweep.states.inputs(sweep.policy, (0, 1))
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    assert pixels.shape == (2, 12, 32, 32) and policy.config.num_patches == 8
    alone = [policy.patches(pixels[:, 6 * image : 6 * image + 6]) for image in range(2)]
    both = policy.patches(pixels)
    # Other shapes of the same products: equal but for rounding.
    torch.testing.assert_close(both, torch.cat(alone, dim=1), rtol=0, atol=NETWORK * float(both.abs().max()))
    tokens = policy.decide(inputs, 3)
    swapped = torch.cat([pixels[:, 6:], pixels[:, :6]], dim=1)
    before, after = (policy.output({"pixel_values": p, "input_ids": ids}, tokens) for p in (pixels, swapped))
    assert (before - after).abs().max() > 1e-2


@pytest.mark.parametrize("unit", UNITS)
def test_every_entry_gives_the_full_precision_signals(sweep: Sweep, unit: str) -> None:
    trunk, reference = sweep.full_precision(sweep.states.split(range(8))[0])
    entered = signals(trunk, sweep.units[unit].segment)
    for name in BOUNDARIES:
        # The same products in the same shapes again; a kernel may still take another way for another alignment.
        for got, full in ((entered.hidden, reference.hidden), (entered.gradients, reference.gradients)):
            torch.testing.assert_close(got[name], full[name], rtol=0, atol=NETWORK * float(full[name].abs().max()))
    torch.testing.assert_close(entered.objective, reference.objective, rtol=NETWORK, atol=0)


@pytest.mark.parametrize(
    ("start", "name"),
    [("projector", "vision"), ("language", "language"), ("head", "head")],
)
def test_gradients_equal_finite_differences(sweep: Sweep, start: str, name: str) -> None:
    trunk, measured = sweep.full_precision((0,))
    entry = trunk.values[trunk.chain.boundaries[name]].detach()
    # Along the gradient the derivative is its norm; other directions drown in the float32 of J.
    direction = measured.gradients[name] / measured.gradients[name].norm()
    slopes = []
    for step in (4e-3 * float(entry.norm()), 8e-3 * float(entry.norm())):
        with torch.no_grad():
            moved = (entry + step * direction, entry - step * direction)
            ahead, behind = (objective_from(sweep.policy, trunk, start, x) for x in moved)
        slopes.append(float(ahead - behind) / (2 * step))
    # Richardson: the cubic term of J cancels between the two central differences.
    expected = (4 * slopes[0] - slopes[1]) / 3
    assert float(measured.gradients[name].norm()) == pytest.approx(expected, rel=3e-3)


def objective_from(policy: OpenVLA, trunk: Trunk, start: str, x: Tensor) -> Tensor:
    """J with `x` entering projector, last decoder block or head, through the policy's own modules."""
    batch = trunk.batch
    model = policy.language_model.model
    if start == "projector":
        ids = torch.cat([batch.inputs["input_ids"], batch.decided[:, :-1]], 1)
        x = policy.hidden(policy.embed(ids, policy.projector(x)))[:, -batch.decided.shape[1] :]
    elif start == "language":
        rotary = model.rotary_emb(x, torch.arange(x.shape[1])[None])
        x = model.layers[-1](x, position_embeddings=rotary)
        x = model.norm(x)[:, -batch.decided.shape[1] :]
    logits = policy.language_model.lm_head(x)
    return logits.log_softmax(-1).gather(-1, batch.decided[..., None]).mean()


def test_a_layer_that_never_runs_scores_exactly_zero(spec: SweepSpec) -> None:
    sweep = spec.open()
    mlp = sweep.policy.get_submodule("vision_backbone.featurizer.blocks.0.mlp")
    # A checkpoint's last block is not built; hang a layer beside the live ones, where no forward pass goes.
    mlp.add_module("dead", torch.nn.Linear(64, 64).requires_grad_(False))
    sweep = Sweep(sweep.policy, sweep.states, sweep.reference, sweep.settings)
    losses = sweep.evaluate("vision_backbone.featurizer.blocks.0.mlp.dead", (W2,), tuple(range(8)))
    assert not losses.mass.any() and not losses.attribution.any() and not losses.action_error.any()


def test_results_do_not_depend_on_batch_size(spec: SweepSpec, sweep: Sweep) -> None:
    single = replace(spec, batch_size=1).open()
    for unit in UNITS[1::2]:
        one = single.evaluate(unit, (W2, W8), tuple(range(8)))
        many = sweep.evaluate(unit, (W2, W8), tuple(range(8)))
        np.testing.assert_allclose(one.mass, many.mass, **MASS)
        np.testing.assert_allclose(one.attribution, many.attribution, **ATTRIBUTION)


def test_layers_of_a_batch_share_its_full_precision_pass(spec: SweepSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = spec.open()
    batches: list[tuple[int, ...]] = []
    original = Sweep.full_precision

    def watched(self: Sweep, samples: tuple[int, ...]) -> tuple[Trunk, Signals]:
        batches.append(samples)
        return original(self, samples)

    monkeypatch.setattr(Sweep, "full_precision", watched)
    split = sweep.states.split(range(8))
    for members in split:
        for unit in UNITS:
            sweep.evaluate(unit, (W4,), members)
    assert batches == split


def test_weights_are_restored(sweep: Sweep) -> None:
    before = {name: tensor.clone() for name, tensor in sweep.policy.state_dict().items()}
    for unit in UNITS:
        sweep.evaluate(unit, (W2,), (0, 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in sweep.policy.state_dict().items())


def test_action_error_is_the_squared_distance_of_decoded_actions(sweep: Sweep) -> None:
    unit = "language_model.lm_head"
    losses = sweep.evaluate(unit, (W2,), tuple(range(8)))
    assert isinstance(sweep.states.decisions, TokenDecisions)
    codec = sweep.states.decisions.codec
    for index in range(8):
        inputs = sweep.states.inputs(sweep.policy, (index,))
        tokens = sweep.reference.decided[index]
        with quantized(sweep.policy, unit, W2), torch.no_grad():
            logits = sweep.policy.output(inputs, torch.from_numpy(tokens)[None])[0]
        chosen = codec.first_token + logits[:, codec.first_token : codec.last_token + 1].argmax(-1).numpy()
        distance = codec.tokens_to_normalised(chosen) - codec.tokens_to_normalised(tokens)
        assert losses.action_error[0, index] == pytest.approx(float((distance**2).sum()))
    assert losses.action_error.any()


def test_likelihood_is_what_quantization_adds_to_the_mean_log_probability(sweep: Sweep) -> None:
    """Below zero where the decision became less likely. Oracle: softmax by float64 sums on the policy's own logits."""
    unit = "language_model.lm_head"
    losses = sweep.evaluate(unit, (W2,), tuple(range(8)))

    def mean_log_probability(index: int) -> float:
        inputs, tokens = sweep.states.inputs(sweep.policy, (index,)), sweep.reference.decided[index]
        with torch.no_grad():
            wanted = torch.from_numpy(tokens)[None]
            logits = sweep.policy.output(inputs, wanted)[0].double().numpy()
        chosen = logits[np.arange(len(tokens)), tokens]
        return float(np.mean(chosen - np.log(np.exp(logits).sum(-1))))

    before = np.asarray([mean_log_probability(index) for index in range(8)])
    with quantized(sweep.policy, unit, W2):
        after = np.asarray([mean_log_probability(index) for index in range(8)])
    # J is a float32 of size 6 that comes out of some 200 operations, and here is a difference of two of them.
    np.testing.assert_allclose(losses.likelihood[0], after - before, atol=1e-4)
    assert (np.abs(after - before) > 0.01).all(), "the sign would not be seen otherwise"
    assert losses.likelihood[0].mean() < 0, "a greedy decision is likely where nothing was quantized"


def test_rounded_activations_change_more_than_weights_alone(sweep: Sweep) -> None:
    unit = "language_model.model.layers.0.self_attn.v_proj"
    both = parse_choice("w8a8_g32")
    weights, with_activations = (sweep.evaluate(unit, (choice,), tuple(range(8))) for choice in (W8, both))
    assert not np.array_equal(weights.mass, with_activations.mass)
    expected = np.asarray(losses_by_loops(sweep, unit, both))
    # Where float32's last bits decide between two codes of an activation, one of some thousand roundings is another.
    np.testing.assert_allclose(with_activations.attribution[0], expected[..., 1], rtol=1e-2, atol=1e-6)


def test_evidence_that_is_not_finite_is_named(spec: SweepSpec) -> None:
    """Of a layer in a choice; where full precision is finite."""

    class Broken:
        def of(self, unit: str, weight: Tensor, choice: Choice) -> QuantizedWeight:
            found = quantize(weight, choice)
            found.scales[:] = torch.inf
            return found

    sweep = spec.open()
    broken = Sweep(sweep.policy, sweep.states, sweep.reference, sweep.settings, Broken())
    with pytest.raises(DataError, match=r"projector.fc1 in w4a16_g32:rtn: evidence of sample 2 at boundary '"):
        broken.evaluate("projector.fc1", (W4,), (2, 3))


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_full_precision_that_is_not_finite_is_not_blamed_on_a_layer(spec: SweepSpec, boundary: str) -> None:
    sweep = spec.open()
    ref = replace(sweep.reference, means={name: mean.copy() for name, mean in sweep.reference.means.items()})
    ref.means[boundary][:] = np.inf
    broken = Sweep(sweep.policy, sweep.states, ref, sweep.settings)
    wanted = rf"^full precision: evidence of sample \d at boundary '{boundary}' is not finite, before any layer is"
    with pytest.raises(DataError, match=wanted):
        broken.evaluate("projector.fc1", (W4,), (2, 3))


def test_a_change_that_is_none_is_rounding_alone(sweep: Sweep) -> None:
    """And it is one: the sums come out otherwise, in vision, projector, decoder and head alike."""
    for unit in UNITS:
        null = sweep.evaluate(unit, (FULL,), (0, 1, 2))
        real = sweep.evaluate(unit, (W8,), (0, 1, 2))
        assert 0 < null.mass.max() < 3e-5 and null.attribution.max() < 1e-9, unit
        assert null.mass.max() < 0.1 * real.mass.max(), unit
        assert not null.action_error.any()
    before = sweep.policy.get_submodule(UNITS[0]).weight.clone()
    with sweep.changed(UNITS[0], FULL):
        assert torch.equal(sweep.policy.get_submodule(UNITS[0]).weight, before.flip(1))
    assert torch.equal(sweep.policy.get_submodule(UNITS[0]).weight, before)


@pytest.mark.parametrize("unit", UNITS)
def test_prompts_of_different_lengths_share_a_batch(spec: SweepSpec, unit: str) -> None:
    """The padding changes nothing: losses are those of every state by itself, and it has no evidence at all."""
    together, alone = replace(spec, batch_size=8).open(), replace(spec, batch_size=1).open()
    (batch,) = together.states.split(range(8))
    inputs = together.states.inputs(together.policy, batch)["input_ids"]
    assert len({int((row != PAD).sum()) for row in inputs}) > 1 and bool((inputs == PAD).any())
    assert all(bool((row[int((row != PAD).sum()) :] == PAD).all()) for row in inputs), "at the right end"
    one, many = (sweep.evaluate(unit, (W2,), tuple(range(8))) for sweep in (alone, together))
    np.testing.assert_allclose(many.mass, one.mass, **MASS)
    np.testing.assert_allclose(many.attribution, one.attribution, **ATTRIBUTION)
    np.testing.assert_array_equal(many.action_error, one.action_error)
    _, full = together.full_precision(batch)
    evidence = together.evidence(full, "language")
    count = together.states.decisions.size
    for row, ids in enumerate(inputs):
        end = together.policy.config.num_patches + int((ids != PAD).sum()) + count - 1
        assert bool((evidence[row, :end].sum(-1) > 0).all()) and not evidence[row, end:].any()


def test_a_policy_that_sees_all_positions_takes_prompts_of_one_length(spec: SweepSpec) -> None:
    sweep = spec.open()
    alike = sweep.states.split(range(8), alike=True)
    assert len(alike) > len(replace(spec, batch_size=8).load_states(spec.empty_policy()).split(range(8))) == 1
    for batch in alike:
        assert not bool((sweep.states.inputs(sweep.policy, batch)["input_ids"] == PAD).any())
    assert not OpenVLAOFT.pads_prompts


@pytest.mark.parametrize(
    ("target", "choice", "rounding"),
    [("cpu", "w8a8_g32", Rounding.GROUP), ("cpu", "w8a8", Rounding.TOKEN), (None, "w8a8_g32", Rounding.TOKEN)],
)
def test_activations_are_rounded_as_the_targets_kernel_does(
    spec: SweepSpec, target: str | None, choice: str, rounding: Rounding
) -> None:
    unit, parsed = "language_model.model.layers.1.mlp.down_proj", parse_choice(choice)
    sweep = replace(spec, settings=SweepSettings((parsed,), target=target)).open()
    found = sweep.evaluate(unit, (parsed,), (0, 1))
    trunk, full = sweep.full_precision((0,))
    with quantized(sweep.policy, unit, parsed, scale=InputScale(rounding)):
        changed = signals(trunk, sweep.units[unit].segment)
    expected = float((changed.objective - full.objective)[0])
    assert found.likelihood[0, 0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("unit", [UNITS[0], UNITS[4], UNITS[6]])
def test_a_fixed_scale_is_that_of_the_calibration_states(spec: SweepSpec, unit: str) -> None:
    """TensorRT's w8a8 in NumPy: the step from inputs that are watched here while every state is decided by itself, the
    product of integers, and what the sweep's layer gives in both passes."""
    (choice,) = parse_choices(("w8a8:rtn",))
    sweep = replace(spec, settings=SweepSettings((choice,), target="orin-jp7")).open()
    layer, seen = sweep.units[unit].module, list[np.ndarray]()
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].numpy()))
    for index in range(len(sweep.states)):
        sweep.policy.decide(sweep.states.inputs(sweep.policy, (index,)), sweep.states.decisions.size)
    handle.remove()
    peak = max(np.abs(x).max() for x in seen)
    # Alone or in a batch, the same sums in another order.
    assert sweep.reference.peaks[unit] == pytest.approx(peak, rel=1e-5)
    step = np.float16(sweep.reference.peaks[unit] / 127).astype(np.float32)
    weight = layer.weight.detach().numpy().reshape(len(layer.weight), -1)
    peaks = np.abs(weight).max(1, keepdims=True)
    rows = np.where(peaks > 0, np.float16(peaks / np.float32(127)), 1).astype(np.float32)
    codes = np.clip(np.rint(weight / rows), -127, 127)
    x = seen[0] * np.float32(1.5)  # so that some values are clipped
    flat = x if x.ndim == 3 else input_rows(layer, torch.from_numpy(x)).view(len(x), -1, weight.shape[1]).numpy()
    inputs = np.clip(np.rint(flat / step), -128, 127)
    expected = (inputs @ codes.T.astype(np.float64)) * (rows[:, 0] * step)
    expected += 0 if layer.bias is None else layer.bias.detach().numpy()
    with sweep.changed(unit, choice), torch.no_grad():
        found = layer(torch.from_numpy(x)).numpy()
    found = found if x.ndim == 3 else found.reshape(*found.shape[:2], -1).transpose(0, 2, 1)
    size = np.abs(inputs * step) @ np.abs(codes * rows).T
    np.testing.assert_array_less(np.abs(found - expected), flat.shape[-1] * SINGLE * (size + np.abs(expected)) + 1e-9)
    per_token = replace(spec, settings=SweepSettings((choice,))).open()
    fixed, free = (one.evaluate(unit, (choice,), (0, 1)) for one in (sweep, per_token))
    assert not np.array_equal(fixed.mass, free.mass), "the rule matters"


def test_unknown_blocks_are_refused(spec: SweepSpec) -> None:
    with pytest.raises(PolicyError, match="blocks 0 to 1"):
        replace(spec, settings=SweepSettings(CHOICES, language_block=2)).open()


def test_macs_count_the_tokens_that_pass(sweep: Sweep) -> None:
    tokens = {unit.name: unit.tokens(prompt_tokens=10, decided=3) for unit in live_units(sweep.policy)}
    assert tokens["vision_backbone.featurizer.patch_embed.proj"] == 4
    assert tokens["vision_backbone.featurizer.blocks.0.attn.qkv"] == 4 + 3
    assert tokens["vision_backbone.fused_featurizer.blocks.0.attn.qkv"] == 4
    assert tokens["projector.fc1"] == 4
    assert tokens["language_model.model.layers.0.mlp.up_proj"] == 4 + 10 + 2
    assert tokens["language_model.lm_head"] == 3


def test_a_policy_whose_tokens_have_another_meaning_is_refused(spec: SweepSpec, tmp_path: Path) -> None:
    """UniVLA's latent actions are ids behind OpenVLA's; decoded as OpenVLA's they would be motion at random."""
    policy = tmp_path / "policy"
    shutil.copytree(spec.policy, policy)
    tensors = load_file(policy / "model.safetensors")
    config = PolicyConfig.load(policy)
    head = tensors["language_model.lm_head.weight"]
    latent = slice(config.token_vocab, config.token_vocab + 32)
    head[latent] = 3 * torch.randn(head[latent].shape, generator=torch.Generator().manual_seed(0)).to(head.dtype)
    save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolicyError, match=r"in 8 of 8 states the policy prefers a token that is no action"):
        replace(spec, policy=str(policy)).open()


def test_a_stray_state_is_no_other_policy() -> None:
    check_strays(1, 8, "set")
    check_strays(3, 30, "set")
    with pytest.raises(PolicyError, match="in 4 of 30 states"):
        check_strays(4, 30, "set")
