"""Layers whose output channels have several widths: a packed product per width, rows put back, the rest absent."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from fake_source import FakeSource
from onnx import TensorProto, helper, numpy_helper
from ragged import observation, write_plan, write_policy
from rounding import NETWORK, assert_clear

from calibrator import quantize as command
from calibrator.data.calibration import collect
from calibrator.families import TorchActor, live_units
from calibrator.quantizers import Computed, find_layer, parse_choice, quantize
from calibrator.quantizers.rows import ROWS, RowBits
from engine_build.__main__ import main
from engine_build.backends.base import Layer, canonical
from engine_build.backends.onnxruntime.linear import linear
from engine_build.graph.builder import GraphBuilder
from engine_build.graph.context import GraphContext
from engine_build.weights import layers_of
from evaluation.actors import ActorSpec
from vla_policy.core.cli import run
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import FULL, Choice
from vla_policy.core.manifest import Manifest
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.runner import load_engine

WIDTHS = (0, 2, 4, 8, 16)
GROUPS = "_g32"


def choice_of(bits: int, groups: str = GROUPS) -> Choice:
    return FULL if bits == 16 else parse_choice(f"w{bits}a16{groups}:rtn")


def random_rows(layers: dict[str, Layer], seed: int = 0) -> RowBits:
    """Every second layer split, with all widths in random order, in the rows that an engine has."""
    generator = np.random.default_rng(seed)

    def bits(layer: Layer) -> np.ndarray:
        widths = np.zeros(layer.outputs + layer.left_out, np.uint8)
        first = layer.rows.start if layer.rows else 0
        widths[first : first + layer.outputs] = generator.choice(WIDTHS, layer.outputs)
        return widths

    return RowBits({name: bits(layer) for name, layer in list(layers.items())[::2]})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy`, `plan.json` with split layers and `engine` in a folder."""
    folder = tmp_path_factory.mktemp("split")
    policy = write_policy(folder / "policy")
    layers = layers_of(PolicyConfig.load(policy))
    rows = random_rows(layers)
    assignment = {name: choice_of(8) for name in rows.units(layers)}
    assignment |= {part.name: choice_of(part.bits) for part in rows.parts.values()}
    write_plan(folder / "plan.json", sha256_policy(policy), assignment, rows)
    build = ["build", "--policy", str(policy), "--target", "cpu", "--plan", str(folder / "plan.json")]
    assert main([*build, "--out", str(folder / "engine")]) == 0
    return folder


def rows_of(folder: Path) -> RowBits:
    return RowBits.load(folder / ROWS, json.loads((folder / "manifest.json").read_text())["files"][ROWS]["sha256"])


def row_by_row(actor: TorchActor, rows: RowBits, groups: str = GROUPS) -> None:
    """The weights as the plan has them, every output channel rounded by itself."""
    for unit in live_units(actor.policy):
        weight = find_layer(actor.policy, unit.name).weight.data
        for row, bits in enumerate(rows.bits.get(unit.name, np.full(len(weight), 8, np.uint8))):
            if bits < 16:
                one = weight[row : row + 1]
                one[:] = quantize(one.clone(), choice_of(int(bits), groups)).dequantize() if bits else 0.0


def test_the_engine_decides_as_the_policy_with_every_row_rounded_by_itself(place: Path) -> None:
    engine, actor = load_engine(place / "engine", threads=1), TorchActor.load(place / "policy")
    row_by_row(actor, rows_of(place / "engine"))
    for seed in range(3):
        seen = observation(seed)
        decision = actor.act(seen)
        expected, got = actor.scores(seen, decision.tokens), engine.scores(seen, decision)
        np.testing.assert_allclose(got, expected, atol=NETWORK * np.abs(expected).max())
        assert_clear(actor.scores(seen, decision.tokens))
        np.testing.assert_array_equal(engine.act(seen).tokens, decision.tokens)


def test_layers_of_one_row_are_the_dense_products_with_one_row(tmp_path: Path) -> None:
    """What the smallest budget of `calibrator channels` leaves: every layer has one output channel, of 2 bits."""
    policy = write_policy(tmp_path / "policy")
    layers = layers_of(PolicyConfig.load(policy))
    rows = RowBits({name: _one_row(layer) for name, layer in layers.items()})
    write_plan(tmp_path / "plan.json", sha256_policy(policy), dict.fromkeys(rows.parts, choice_of(2)), rows)
    build = ["build", "--policy", str(policy), "--target", "cpu", "--plan", str(tmp_path / "plan.json")]
    assert main([*build, "--out", str(tmp_path / "engine")]) == 0
    engine, actor = load_engine(tmp_path / "engine", threads=1), TorchActor.load(policy)
    row_by_row(actor, rows)
    seen = observation(0)
    decision = actor.act(seen)
    expected = actor.scores(seen, decision.tokens)
    np.testing.assert_allclose(engine.scores(seen, decision), expected, atol=NETWORK * np.abs(expected).max())
    assert main(["verify", str(tmp_path / "engine"), "--policy", str(policy), "--out", str(tmp_path / "v.json")]) == 0


def _one_row(layer: Layer) -> np.ndarray:
    widths = np.zeros(layer.outputs + layer.left_out, np.uint8)
    widths[(layer.rows.start if layer.rows else 0) + layer.outputs // 3] = 2
    return widths


def test_a_layer_without_any_row_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime would drop the layers before it, of which nothing could then be proven."""
    policy = write_policy(tmp_path / "policy")
    layers = layers_of(PolicyConfig.load(policy))
    name = "vision_backbone.featurizer.blocks.0.attn.proj"
    rows = RowBits({name: np.zeros(layers[name].outputs, np.uint8)})
    write_plan(
        tmp_path / "plan.json", sha256_policy(policy), dict.fromkeys(rows.units(layers), choice_of(8)), rows
    )
    build = ["build", "--policy", str(policy), "--target", "cpu", "--plan", str(tmp_path / "plan.json")]
    assert run(lambda: main([*build, "--out", str(tmp_path / "engine")])) == 2
    assert f"{name}: all its output channels have 0 bits" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()


def test_bytes_are_those_of_the_rows_that_are_there(place: Path) -> None:
    manifest, rows = Manifest.load(place / "engine"), rows_of(place / "engine")
    units = {unit.name: unit for unit in manifest.units}
    for layer, bits in rows.bits.items():
        assert layer not in units and f"{layer}.rows0" not in units
        for width in (2, 4, 8, 16):
            unit, count = units[f"{layer}.rows{width}"], int((bits == width).sum())
            assert unit.outputs == count
            assert unit.choice == choice_of(width)
            assert unit.realised == str(canonical(choice_of(width).format, unit.inputs))
            inputs = unit.inputs if width == 16 else -(-unit.inputs // 32) * 32  # whole groups
            least, most = (-(-count * one * width // 8) for one in (unit.inputs, inputs))
            assert least <= unit.code_bytes <= most
            assert unit.scale_bytes == (0 if width == 16 else 2 * count * -(-unit.inputs // 32))
    # The files hold no more than that: neither absent rows nor a second copy.
    stored = sum(
        int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for spec in manifest.graphs.values()
        for tensor in onnx.load(str(place / "engine" / spec.file), load_external_data=False).graph.initializer
        if any(tensor.name.startswith(f"{layer}.") for layer in rows.bits)
        and not tensor.name.endswith((".codes", ".scales"))
    )
    whole = layers_of(manifest.config)
    assert stored == sum(
        (4 + 4 * whole[name].bias) * len(bits) + 2 * int((bits == 16).sum()) * whole[name].inputs
        for name, bits in rows.bits.items()
    )


def test_verify_proves_it_part_by_part_and_finds_a_changed_width(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(place / "engine"), "--policy", str(place / "policy")]
    assert main([*arguments, "--samples", "2", "--out", str(place / "verification.json")]) == 0
    found = json.loads((place / "verification.json").read_text())
    assert {str(choice_of(bits).format) for bits in (2, 4, 8, 16)} <= found["reference"]["layers"]["formats"].keys()
    rows = rows_of(place / "engine")
    layer, bits = next(iter(rows.bits.items()))
    changed = RowBits({**rows.bits, layer: np.roll(bits, 1)})
    before = (place / "engine" / ROWS).read_bytes()
    changed.save(place / "engine" / ROWS)
    capsys.readouterr()
    assert run(lambda: main(arguments)) == 2
    (place / "engine" / ROWS).write_bytes(before)
    assert "sha256 differs from the manifest's" in capsys.readouterr().err


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("present", [(0, 2, 4, 8, 16), (4,), (0, 8), (2, 16), (0,)])
def test_one_layer_gives_the_products_in_float64(present: Sequence[int], bias: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    outputs, inputs = 24, 72
    bits = generator.choice(present, outputs).astype(np.uint8)
    bits[: len(present)] = present
    if len(present) > 2:  # one row of 16 bits
        bits[bits == 16], bits[5] = 8, 16
    weight = torch.from_numpy(generator.standard_normal((outputs, inputs), np.float32)).bfloat16()
    offset = torch.from_numpy(generator.standard_normal(outputs).astype(np.float32))
    layer, rows = Layer("layer", "linear", "layer", outputs, inputs, bias), RowBits({"layer": bits})

    class Tensors:
        def tensor(self, name: str) -> torch.Tensor:
            return {"layer.weight": weight, "layer.bias": offset}[name]

    with GraphBuilder(tmp_path / "layer.onnx") as builder:
        choices = {part.name: choice_of(part.bits, "") for part in rows.parts.values()}
        context = GraphContext(
            builder, Tensors(), {"layer": layer}, choices, Computed(), linear, lambda *_: None, {}, rows=rows
        )  # fmt: skip
        builder.rename(context.linear("x", "layer"), "y")
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", size])
            for name, size in (("x", inputs), ("y", outputs))
        ]
        builder.save(ends[:1], ends[1:])
    session = ort.InferenceSession(str(tmp_path / "layer.onnx"), providers=["CPUExecutionProvider"])
    x = generator.standard_normal((1, 5, inputs)).astype(np.float32)
    expected = np.zeros((5, outputs))
    for row, width in enumerate(bits):
        if width:
            one = weight[row : row + 1].float()
            values = one if width == 16 else quantize(one, choice_of(int(width), "")).dequantize()
            expected[:, row] = x[0].astype(np.float64) @ values[0].double().numpy()
        expected[:, row] += float(offset[row]) if bias else 0.0
    got = session.run(None, {"x": x})[0][0]
    allowed = (inputs + 2) * 2.0**-24 * (np.abs(x[0]) @ np.abs(weight.float().numpy()).T * 1.5 + 1)
    assert (np.abs(got - expected) <= allowed).all()
    assert np.array_equal(np.sort(numpy_helper.to_array(_tensor(tmp_path, "layer.places"))), np.arange(outputs))


def _tensor(folder: Path, name: str) -> onnx.TensorProto:
    graph = onnx.load(str(folder / "layer.onnx")).graph
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def test_codes_of_parts_may_lie_in_a_store(place: Path, tmp_path: Path) -> None:
    """A method that looks at a layer's input rounds the parts; engine and simulated policy take the same codes."""
    collect([FakeSource((4,), state_dim=3)], tmp_path / "calibration", count=3, seed=0)
    store = command.quantize(
        command.QuantizeRequest(
            place / "policy", tmp_path / "weights", place / "plan.json", None, "gptq", tmp_path / "calibration"
        )
    )
    arguments = ["--policy", str(place / "policy"), "--weights", str(store.folder)]
    assert main(["build", *arguments, "--target", "cpu", "--out", str(tmp_path / "engine")]) == 0
    assert main(["verify", str(tmp_path / "engine"), *arguments, "--samples", "1", "--out", str(tmp_path / "v")]) == 0
    spec = ActorSpec("policy", place / "policy", weights=store.folder)
    manifest = Manifest.load(tmp_path / "engine")
    bits = sum(unit.outputs * unit.inputs * unit.choice.format.weight_bits for unit in manifest.units)
    scales = sum(unit.scale_bytes for unit in manifest.units)
    places = 4 * sum(len(found) for found in store.identity.rows.bits.values())
    assert spec.size().stored_bytes == bits // 8 + scales + places
    assert spec.size().code_bits == bits


@pytest.mark.parametrize(
    ("target", "remedy"),
    [("a100", "allocate by layers"), ("cpu --backend onnxruntime_vnni", "build with --backend onnxruntime")],
)
def test_other_backends_refuse_it_by_name(
    target: str, remedy: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ["build", "--policy", str(place / "policy"), "--plan", str(place / "plan.json")]
    build += ["--out", str(tmp_path / "e")]
    assert run(lambda: main([*build, "--target", *target.split()])) == 2
    assert not (tmp_path / "e").exists()
    message = capsys.readouterr().err
    assert "layers.0.mlp.up_proj" in message and "several widths" in message and remedy in message
