"""QuantVLA's corrections: their factors from recorded logits and outputs, and what folding them does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_source import FakeSource
from pi05_policy import tiny_pi05_folder
from tiny import tiny_policy_folder
from torch import Tensor, nn

from calibrator.data.calibration import CalibrationSet, collect, load_calibration
from calibrator.families import TorchActor, load_policy
from calibrator.modules.gemma import Attention, rotation
from calibrator.quantizers import parse_choice, quantize_policy
from calibrator.transform import TransformRequest, transform
from calibrator.transforms import find_transform
from calibrator.transforms.methods.quantvla import balance, correct, rounded_layers, temperatures
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.flow.config import GemmaSpec

EXPERT = "paligemma_with_expert.gemma_expert.model.layers"
METHOD = find_transform("quantvla")
COARSE = {**METHOD.defaults, "weight_bits": 2, "group": 32, "rotated": False}
"""Rough enough to move every factor out of its neutral band."""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy` and `calibration`."""
    folder = tmp_path_factory.mktemp("quantvla")
    tiny_pi05_folder(folder / "policy")
    collect([FakeSource((5, 4))], folder / "calibration", count=6, seed=0)
    return folder


def recorded(actor: TorchActor, states: CalibrationSet) -> tuple[np.ndarray, np.ndarray]:
    """Mean std of the logits [layers, heads] and mean rms of the outputs [layers], by watching torch itself."""
    original, calls, outputs = nn.functional.scaled_dot_product_attention, [], []

    def watched(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        calls.append((query.numpy(), key.numpy()))
        return original(query, key, value, *rest)

    layers = [actor.policy.get_submodule(f"{EXPERT}.{n}.self_attn.o_proj") for n in range(3)]
    handles = [layer.register_forward_hook(lambda _, __, output: outputs.append(output.numpy())) for layer in layers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", watched)
        for index in range(len(states)):
            actor.act(states.observation(index))
    for handle in handles:
        handle.remove()
    # Of the expert: 4 rows of 2 heads that share keys, which are the prefix's and their own.
    expert = [(query, key) for query, key in calls if query.shape[1:3] == (1, 8) and key.shape[2] > 8]
    assert len(expert) == len(outputs) == 3 * 3 * len(states), "layers, steps, states"
    spreads = []
    for query, key in expert:
        heads = query.astype(np.float64).reshape(2, 4, 32)
        logits = np.einsum("htd,sd->hts", heads, key[0, 0].astype(np.float64)) / np.sqrt(32)
        spreads.append(logits.reshape(2, -1).std(1, ddof=1))
    sizes = [np.sqrt(np.square(output.astype(np.float64)).mean()) for output in outputs]
    by_layer = (-1, 3)
    return np.reshape(spreads, (*by_layer, 2)).mean(0), np.reshape(sizes, by_layer).mean(0)


def weights(actor: TorchActor, layer: int, part: str) -> np.ndarray:
    weight: Tensor = actor.policy.get_submodule(f"{EXPERT}.{layer}.self_attn.{part}").weight
    return weight.detach().double().numpy()


@pytest.mark.parametrize("rotated", [False, True])
def test_factors_are_those_of_what_torch_computed(material: Path, rotated: bool) -> None:
    """Mean std of teacher over rounded, clipped to [0.7, 1.4]; mean rms likewise, clipped to 0.3 in the logarithm."""
    states = load_calibration(material / "calibration")
    before, rounded, corrected = (TorchActor.load(material / "policy") for _ in range(3))
    names = [name for name, module in before.policy.named_modules() if isinstance(module, nn.Linear)]
    of_language = [
        name for name in names
        if ".language_model.layers." in name or (name.startswith(EXPERT) and ".mlp." in name)
    ]  # fmt: skip
    assert sorted(rounded_layers(before.policy)) == sorted(of_language)
    choice = parse_choice(f"w2a8_g32:{'quantvla' if rotated else 'rtn'}")
    quantize_policy(rounded.policy, dict.fromkeys(of_language, choice))
    (wanted, wanted_size), (got, got_size) = recorded(before, states), recorded(rounded, states)
    alphas, betas = np.clip(wanted / got, 0.7, 1.4), np.clip(wanted_size / got_size, np.exp(-0.3), np.exp(0.3))
    alphas[np.abs(alphas - 1) < 0.02] = 1
    betas[np.abs(np.log(betas)) < 0.03] = 1
    assert (alphas != 1).sum() > 2 and (betas != 1).any(), "the case says something"
    told = METHOD.apply(corrected, states, {**COARSE, "rotated": rotated}, "states")
    assert f"temperature of {(alphas != 1).sum()} of 6 heads" in told
    assert f"balance of {(betas != 1).sum()} of 3 layers" in told
    for layer in range(3):
        queries = (weights(corrected, layer, "q_proj") / weights(before, layer, "q_proj")).reshape(2, 32, -1)
        # float32 statistics and weights.
        np.testing.assert_allclose(queries, np.broadcast_to(alphas[layer, :, None, None], queries.shape), rtol=2e-5)
        output = weights(corrected, layer, "o_proj") / weights(before, layer, "o_proj")
        np.testing.assert_allclose(output, betas[layer], rtol=2e-5)
    for name, weight in before.policy.state_dict().items():
        if not name.endswith(("self_attn.q_proj.weight", "self_attn.o_proj.weight")) or not name.startswith(EXPERT):
            assert torch.equal(weight, corrected.policy.state_dict()[name]), name


def test_each_correction_can_be_left_out(material: Path) -> None:
    states, before = load_calibration(material / "calibration"), TorchActor.load(material / "policy")
    for part, kept in (("temperature", "q_proj"), ("balance", "o_proj")):
        actor = TorchActor.load(material / "policy")
        METHOD.apply(actor, states, {**COARSE, part: False}, "states")
        changed = [not np.array_equal(weights(actor, n, kept), weights(before, n, kept)) for n in range(3)]
        other = "o_proj" if kept == "q_proj" else "q_proj"
        moved = [not np.array_equal(weights(actor, n, other), weights(before, n, other)) for n in range(3)]
        assert not any(changed) and any(moved)


def test_folded_factors_are_the_scaled_computation_in_float64() -> None:
    """Through RoPE and keys that heads share: softmax(alpha L) V, then beta times the output projection."""
    generator = torch.Generator().manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    spec = GemmaSpec(hidden_size=24, intermediate_size=8, num_hidden_layers=1, **heads)
    attention = Attention(spec).double()
    sizes = ((2, 3, 24), (2, 2, 7, 6), (2, 2, 7, 6))
    x, key, value = (torch.randn(*size, generator=generator).double() for size in sizes)
    turn = rotation(torch.arange(4, 7), 6).double()
    alpha, beta = torch.tensor([0.8, 1.3, 1.0, 0.7]).double(), torch.tensor(1.2).double()
    with torch.no_grad():
        queries = attention.q_proj(x).view(2, 3, 4, 6).transpose(1, 2)
        first, second = queries.chunk(2, -1)
        queries = queries * turn[0] + torch.cat([-second, first], -1) * turn[1]
        keys, values = (part.repeat_interleave(2, 1) for part in (key, value))
        logits = queries @ keys.mT / 6**0.5
        torch.testing.assert_close(attention.logits(x, turn, key), logits, rtol=0, atol=1e-12)
        mixed = (alpha[:, None, None] * logits).softmax(-1) @ values
        wanted = beta * attention.o_proj(mixed.transpose(1, 2).flatten(2))
        correct(attention, alpha, beta)
        torch.testing.assert_close(attention(x, turn, key, value, None), wanted, rtol=0, atol=1e-12)


def test_factors_are_clipped_and_small_ones_left_out() -> None:
    one = torch.ones(4, dtype=torch.float64)
    ratios = torch.tensor([0.1, 3.0, 1.019, 0.9], dtype=torch.float64)
    torch.testing.assert_close(temperatures(ratios, one).tolist(), [0.7, 1.4, 1.0, 0.9])
    found = [float(balance(ratio, one[0])) for ratio in torch.tensor([0.1, 3.0, 1.029, 0.9], dtype=torch.float64)]
    torch.testing.assert_close(found, [float(np.exp(-0.3)), float(np.exp(0.3)), 1.0, 0.9])


def test_rounding_that_changes_nothing_is_not_corrected(material: Path) -> None:
    out = material / "same"
    done = transform(TransformRequest(
        material / "policy", material / "calibration", out, "quantvla(weight_bits=8,activation_bits=16)"
    ))  # fmt: skip
    assert "temperature of 0 of 6 heads corrected (1.000 to 1.000), balance of 0 of 3 layers" in done
    after = load_policy(out).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in load_policy(material / "policy").state_dict().items())


def test_what_it_is_not_for_is_refused(material: Path, tmp_path: Path) -> None:
    collect([FakeSource((9,))], tmp_path / "first", count=1, seed=0)
    with pytest.raises(ArtefactError, match=r"its states lie between .* of their trajectories"):
        transform(TransformRequest(material / "policy", tmp_path / "first", tmp_path / "out", "quantvla"))
    tokens = tiny_policy_folder(tmp_path / "tokens")
    with pytest.raises(PolicyError, match="attention of an action expert; this policy has none"):
        transform(TransformRequest(tokens, material / "calibration", tmp_path / "out", "quantvla"))
    assert not (tmp_path / "out").exists()
