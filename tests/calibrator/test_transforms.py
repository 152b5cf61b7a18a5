"""Transforms: the same policy, number for number, with other ranges."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_source import FakeSource
from safetensors.torch import load_file, save_file
from tiny import tiny_policy_folder
from torch import Tensor

from calibrator.__main__ import main
from calibrator.data.calibration import collect, load_calibration
from calibrator.data.statistics import input_statistics
from calibrator.families import TorchActor, load_policy
from calibrator.quantizers import LayerStatistics, parse_choice, quantize
from calibrator.quantizers.activations import quantize_activation
from calibrator.transform import TransformRequest, transform
from calibrator.transforms import find_transform, parse_transform
from calibrator.transforms.fold import folds_of
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.files import sha256_policy

FORMS = [(1, None), (2, 4)]  # OpenVLA, and OpenVLA-OFT with two cameras


@pytest.fixture(scope="module", params=FORMS, ids=["openvla", "openvla_oft"])
def material(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy`, `calibration` and, of them, `smooth`."""
    folder = tmp_path_factory.mktemp("transforms")
    images, chunk = request.param
    policy = tiny_policy_folder(folder / "policy", images=images, chunk=chunk)
    with_outliers(policy)
    collect([FakeSource((5, 4), images=images)], folder / "calibration", count=4, seed=0)
    assert transform(TransformRequest(policy, folder / "calibration", folder / "smooth", "smoothquant"))
    return folder


def with_outliers(policy: Path) -> None:
    """Some channels of each norm a hundred times as large as the others, as in trained decoders."""
    tensors = load_file(policy / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm.weight" in name or name.endswith(("norm1.weight", "norm2.weight")):
            tensor[::17] *= 100
    save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})


def test_decisions_and_scores_stay_what_they_were_bit_for_bit(material: Path) -> None:
    """Powers of two are exact, in bfloat16 on the disk too; only the order of nothing changes."""
    states = load_calibration(material / "calibration")
    before, after = TorchActor.load(material / "policy"), TorchActor.load(material / "smooth")
    changed = load_policy(material / "smooth").state_dict()
    assert any(not torch.equal(tensor, changed[name]) for name, tensor in before.policy.state_dict().items())
    for index in range(len(states)):
        observation = states.observation(index)
        decided = before.act(observation)
        np.testing.assert_array_equal(after.act(observation).action, decided.action)
        tokens = decided.tokens if decided.tokens.size else decided.action.reshape(-1).astype(np.float32)
        np.testing.assert_array_equal(after.scores(observation, tokens), before.scores(observation, tokens))


def test_factors_are_the_paper_s_up_to_their_power_of_two(material: Path) -> None:
    """Eq. (4) written out in NumPy for every norm, from inputs that are watched here and not by the product."""
    states, actor = load_calibration(material / "calibration"), TorchActor.load(material / "policy")
    smooth = TorchActor.load(material / "smooth").policy
    folds, after = folds_of(actor.policy), folds_of(smooth)
    seen: dict[str, list[np.ndarray]] = {fold.first: [] for fold in folds}
    for fold in folds:
        layer = fold.layers[fold.first]
        layer.register_forward_pre_hook(lambda _, args, rows=seen[fold.first]: rows.append(args[0].abs().numpy()))
    for index in range(len(states)):
        actor.act(states.observation(index))
    for fold, folded in zip(folds, after, strict=True):
        peaks = np.max([rows.reshape(-1, rows.shape[-1]).max(0) for rows in seen[fold.first]], axis=0)
        columns = np.max([layer.weight.abs().numpy().max(0) for layer in fold.layers.values()], axis=0)
        wanted = np.sqrt(peaks / columns)
        got = (fold.source.weight / folded.source.weight).numpy()
        assert (np.log2(got) == np.round(np.log2(got))).all()
        # Half a power of two to either side, and float32's rounding of a square root.
        assert (np.abs(np.log2(got / wanted)) <= 0.5 + 1e-5).all()
        for name, layer in fold.layers.items():
            torch.testing.assert_close(folded.layers[name].weight, layer.weight * torch.from_numpy(got), rtol=0, atol=0)


def rounded_error(x: Tensor, weight: Tensor) -> float:
    """Of x W^T with 8-bit activations per token and 8-bit weights per row, relative."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    product = quantize_activation(x, 8) @ ((weight / scale).round() * scale).T
    return float((product - x @ weight.T).norm() / (x @ weight.T).norm())


def test_outliers_hurt_less_afterwards() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 64, generator=generator), torch.randn(32, 64, generator=generator)
    x[:, ::16] *= 100
    statistics = LayerStatistics(len(x), x.abs().amax(0), x.abs().mean(0))
    method = find_transform("smoothquant")
    factors = method.factors(statistics, [weight], method.defaults)
    assert rounded_error(x / factors, weight * factors) < 0.5 * rounded_error(x, weight)


def test_awq_s_scales_lose_less_of_the_output_than_none() -> None:
    """None is one of the ratios; channels that see much are worth finer steps."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(400, 64, generator=generator).double(), torch.randn(32, 64, generator=generator)
    x[:, ::16] *= 30
    statistics = LayerStatistics(len(x), x.abs().amax(0).float(), x.abs().mean(0).float(), x.T @ x / len(x))
    method, choice = find_transform("awq"), parse_choice("w3a16_g32:rtn")
    factors = method.factors(statistics, [weight], {"bits": 3, "group": 32}).double()
    assert bool((factors.log2() == factors.log2().round()).all())

    def lost(scales: Tensor) -> float:
        rounded = quantize((weight * scales).float(), choice).dequantize().double() / scales
        return float((x @ (rounded - weight.double()).T).square().sum())

    assert lost(factors) < 0.5 * lost(torch.ones(64))
    with pytest.raises(PolicyError, match="5-bit codes are not supported"):
        method.factors(statistics, [weight], {"bits": 5, "group": 32})


def test_awq_folds_into_layers_too_and_changes_no_decision(material: Path) -> None:
    out = material / "awq"
    folded = transform(TransformRequest(material / "policy", material / "calibration", out, "awq(bits=3,group=8)"))
    before, after = TorchActor.load(material / "policy"), TorchActor.load(out)
    folds = len(folds_of(before.policy, after_layers=True))
    assert f"{folds} norms and layers" in folded and folds > len(folds_of(before.policy))
    changed = [name for name, value in before.policy.state_dict().items()
               if not torch.equal(value, after.policy.state_dict()[name])]  # fmt: skip
    assert any(name.endswith("v_proj.weight") for name in changed)
    assert any(name.endswith("down_proj.weight") for name in changed)
    states = load_calibration(material / "calibration")
    for index in range(len(states)):
        observation = states.observation(index)
        np.testing.assert_array_equal(after.act(observation).action, before.act(observation).action)


def test_the_command_records_what_it_did(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, calibration, out = (str(material / name) for name in ("policy", "calibration", "again"))
    command = ["transform", "--policy", policy, "--calibration", calibration, "--out", out]
    assert main([*command, "--method", "smoothquant(strength=0.75)"]) == 0
    assert "computes the same in 16 bits" in capsys.readouterr().out
    (entry,) = json.loads((Path(out) / "config.json").read_text())["transforms"]
    assert entry["recipe"] == {"method": "smoothquant", "version": 1, "parameters": {"strength": 0.75}}
    assert entry["parents"]["policy"] == sha256_policy(Path(policy))
    twice = TransformRequest(Path(out), Path(calibration), material / "twice", "smoothquant")
    assert transform(twice) and len(json.loads((material / "twice/config.json").read_text())["transforms"]) == 2
    assert main([*command[:-1], policy]) == 2
    assert main([*command[:-1], str(material / "x"), "--method", "smoothquant(strength=2.0)"]) == 2
    assert "strength 2.0: expected a number from 0 to 1" in capsys.readouterr().err
    assert not (material / "x").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rotate", "transform 'rotate' is unknown; choose one of: awq, quantvla, smoothquant"),
        ("smoothquant(alpha=1)", "'alpha'"),
    ],
)
def test_what_does_not_exist_is_named(text: str, message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        parse_transform(text)


def test_statistics_of_a_layer_that_sees_nothing_are_refused(material: Path) -> None:
    actor = TorchActor.load(material / "policy")
    first = folds_of(actor.policy)[0]
    torch.nn.init.zeros_(first.source.weight)
    torch.nn.init.zeros_(first.source.bias)
    with pytest.raises(ArtefactError, match="zero or not finite"):
        input_statistics(actor, load_calibration(material / "calibration"), [first.first], "states")
