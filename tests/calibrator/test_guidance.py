"""Rows that weigh what the decision asks of them, against differences and NumPy; and codes that are made with them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_source import FakeSource
from tiny import tiny_policy_folder
from torch import Tensor, nn

from calibrator.data.calibration import collect, load_calibration
from calibrator.data.statistics import input_statistics
from calibrator.families import TorchActor
from calibrator.quantize import QuantizeRequest
from calibrator.quantize import quantize as write_store
from calibrator.quantizers import find_layer, parse_choice, quantize
from calibrator.quantizers.store import Store

STEP = 0.02  # J is float32: below, its rounding would show
LAYERS = ("vision_backbone.featurizer.patch_embed.proj", "projector.fc3", "language_model.model.layers.1.mlp.down_proj")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `policy` and `calibration`."""
    folder = tmp_path_factory.mktemp("guidance")
    tiny_policy_folder(folder / "policy")
    collect([FakeSource((4, 3))], folder / "calibration", count=2, seed=0)
    return folder


def token_axes(y: Tensor) -> Tensor:
    """A layer's output as [B, rows, channels]; a view."""
    return y.flatten(2).transpose(1, 2) if y.ndim == 4 else y


def slope_sizes(layer: nn.Module, firmness: Callable[[int], Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The layer's input rows, and |dJ/dy| of each by central differences, one output of one row in every copy.

    firmness: J of so many copies of a state.
    """
    seen: list[Tensor] = []
    changes = torch.zeros(0)

    def moved(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        x = nn.functional.unfold(x, 16, stride=16).transpose(1, 2) if x.ndim == 4 else x
        seen[:] = [x[0], token_axes(output)[0]]
        if len(changes):
            output = output.clone()
            token_axes(output).add_(changes.to(output))
        return output

    handle = layer.register_forward_hook(moved)
    firmness(1)
    rows, shape = seen[0].numpy(), seen[1].shape
    slopes = []
    for part in torch.eye(shape.numel()).view(-1, *shape).split(256):
        both = []
        for step in (STEP, -STEP):
            changes = step * part
            both.append(firmness(len(part)))
        slopes.append((both[0] - both[1]) / (2 * STEP))
    handle.remove()
    return rows, torch.cat(slopes).view(shape).norm(dim=1).numpy()


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_weighs_what_changes_of_its_output_do_to_the_decision(place: Path, name: str) -> None:
    actor, states = TorchActor.load(place / "policy", dtype=torch.float64), load_calibration(place / "calibration")
    layer = find_layer(actor.policy, name)
    expected = np.zeros((layer.weight[0].numel(),) * 2)
    for index in range(len(states)):
        state = actor.robot.inputs(states.observation(index))
        decided = actor.policy.decide(actor.policy.tensors([state]), actor.decisions.size)

        @torch.no_grad()
        def firmness(copies: int, state: Mapping[str, np.ndarray] = state, decided: Tensor = decided) -> Tensor:
            every = decided.expand(copies, -1)
            output = actor.policy.output(actor.policy.tensors([state] * copies), every)
            return actor.decisions.objective(output, every).double()

        rows, sizes = slope_sizes(layer, firmness)
        weights = 0.8 * sizes / sizes.sum() + 0.2 / len(sizes)
        expected += (rows * weights[:, None]).T @ rows / len(states)
    found = input_statistics(actor, states, [name], "states", second_moments=True, guided=True)[name]
    assert found.second_moment is not None
    np.testing.assert_allclose(found.second_moment, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_codes_are_gptq_s_on_that_mean_in_every_layer_of_a_group(place: Path, tmp_path: Path) -> None:
    """Queries and keys have one input, whose rows weigh differently for each."""
    choice = parse_choice("w3a16_g8:guided")
    write_store(QuantizeRequest(place / "policy", tmp_path / "w", None, choice, None, place / "calibration"))
    store, actor = Store.open(tmp_path / "w"), TorchActor.load(place / "policy")
    names = [f"language_model.model.layers.0.self_attn.{one}_proj" for one in "qk"]
    states = load_calibration(place / "calibration")
    found = input_statistics(actor, states, names, "states", second_moments=True, guided=True)
    moments = [found[name].second_moment for name in names]
    assert moments[0] is not None and moments[1] is not None and not torch.allclose(moments[0], moments[1])
    for name in names:
        weight = find_layer(actor.policy, name).weight
        coded, plain = store.of(name, weight, choice), parse_choice("w3a16_g8:gptq")
        assert torch.equal(coded.codes, quantize(weight, plain, found[name]).codes)
