"""Layers whose input goes through an operator: engines compute what the calibrator's torch twin does."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fake_source import FakeSource
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from ragged import mixed_assignment, write_plan
from rounding import NETWORK
from tiny import tiny_policy_folder
from vnni import needs_vnni

from calibrator.data.calibration import collect, load_calibration
from calibrator.families import TorchActor
from calibrator.quantize import QuantizeRequest, quantize
from calibrator.quantizers import quantize_policy
from calibrator.quantizers.methods.duquant import found_operator
from calibrator.quantizers.store import Store
from calibrator.quantizers.turning import InputOperator, Turn
from engine_build.build import Request, build
from engine_build.graph.builder import GraphBuilder
from engine_build.graph.turning import turned
from engine_build.verify import States, verify
from engine_build.weights import layers_of
from vla_policy.core.backends import find_backend
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_policy
from vla_policy.core.manifest import Manifest
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import find_target

WITH_8 = [
    "w4a8_g32:duquant(block=32,steps=8)",
    "w8a8:duquant(block=16,rotations=1,shared=false,steps=4)",
    "w2a16_g32:duquant(block=32,steps=4)",
    "w16a16",
    "w4a16_g32:duquant(rotations=1,steps=4)",
    "w4a8_g32:quantvla(block=16)",
    "w4a16_g32:quantvla",
]
WITH_16 = [choice for choice in WITH_8 if "a8" not in choice]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turned")
    tiny_policy_folder(folder / "policy")
    collect([FakeSource((3, 2))], folder / "calibration", count=3, seed=0)
    return folder


def stored(material: Path, out: Path, choices: list[str]) -> Path:
    """Codes of the choices in turn over the layers."""
    layers = list(layers_of(PolicyConfig.load(material / "policy")))
    plan = write_plan(out / "plan.json", sha256_policy(material / "policy"), mixed_assignment(layers, choices))
    quantize(QuantizeRequest(material / "policy", out / "weights", plan, calibration=material / "calibration"))
    return out / "weights"


@pytest.mark.parametrize(
    ("backend", "choices"),
    [("onnxruntime", WITH_8), pytest.param("onnxruntime_vnni", WITH_8, marks=needs_vnni), ("openvino", WITH_16)],
)
def test_every_layer_is_the_twin_s(material: Path, tmp_path: Path, backend: str, choices: list[str]) -> None:
    """By `verify`: bytes exported again, formats read back, and every layer on the engine's own values."""
    if backend == "openvino":
        pytest.importorskip("openvino", reason="the backend is an optional extra")
    weights = stored(material, tmp_path, choices)
    request = Request(material / "policy", find_target("cpu"), tmp_path / "engine", weights=weights, backend=backend)
    build(request)
    states = States(material / "calibration", 3)
    outcome = verify(tmp_path / "engine", material / "policy", states, weights)
    assert outcome.reference is not None and outcome.reference.layers is not None
    assert all(found.error <= found.allowed for found in outcome.reference.layers.formats.values())
    graphs = [onnx.load(tmp_path / "engine" / spec.file) for spec in Manifest.load(tmp_path / "engine").graphs.values()]
    names = {tensor.name for graph in graphs for tensor in graph.graph.initializer}
    assert any(name.endswith(".turns.1.blocks") for name in names)
    assert find_backend(backend).name == Manifest.load(tmp_path / "engine").backend


def test_decisions_are_the_twin_s(material: Path, tmp_path: Path) -> None:
    weights = stored(material, tmp_path, WITH_16)
    build(Request(material / "policy", find_target("cpu"), tmp_path / "engine", weights=weights, backend="onnxruntime"))
    engine, actor = load_engine(tmp_path / "engine", threads=1), TorchActor.load(material / "policy")
    store = Store.open(weights)
    quantize_policy(actor.policy, store.identity.choices, store)
    states = load_calibration(material / "calibration")
    for index in range(len(states)):
        seen = states.observation(index)
        decision = actor.act(seen)
        expected = actor.scores(seen, decision.tokens)
        np.testing.assert_allclose(engine.scores(seen, decision), expected, atol=NETWORK * np.abs(expected).max())


def run(path: Path, operator: InputOperator, x: np.ndarray, layers: int = 1) -> np.ndarray:
    """The operator's graph by ONNX's reference implementation."""
    shape = [x.shape[0], "tokens", x.shape[2]]
    with GraphBuilder(path, TensorProto.FLOAT) as builder:
        values = [turned(builder, "x", operator, f"layer{number}") for number in range(layers)]
        assert len(set(values)) == 1, "layers of one input share it"
        builder.rename(values[0], "y")
        builder.save(*([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in "xy"))
    return np.asarray(ReferenceEvaluator(str(path)).run(None, {"x": x})[0])


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("inputs", "shared", "rotations"), [(64, 1, 2), (70, 0, 1), (96, 0, 2), (40, 1, 1)])
def test_the_graph_computes_the_operator(
    tmp_path: Path, images: int, inputs: int, shared: int, rotations: int
) -> None:
    x = torch.randn(images, 5, inputs, generator=torch.Generator().manual_seed(0))
    given = {"block": 32, "rotations": rotations, "steps": 3, "shared": bool(shared)}
    operator = found_operator(x.flatten(0, 1), given)
    got = run(tmp_path / "graph.onnx", operator, x.numpy(), layers=2)
    # Sums of 32 products in float32, once or twice.
    np.testing.assert_allclose(got, operator.apply(x.double()).numpy(), rtol=0, atol=64 * 2**-24 * float(x.abs().max()))


def test_another_operator_of_the_same_input_is_not_shared(tmp_path: Path) -> None:
    one, other = (InputOperator((Turn(torch.arange(8).roll(by), torch.eye(4)[None]),)) for by in (1, 2))
    with GraphBuilder(tmp_path / "graph.onnx", TensorProto.FLOAT) as builder:
        assert turned(builder, "x", one, "a") != turned(builder, "x", other, "b") != turned(builder, "y", other, "c")


@pytest.mark.parametrize("fmt", ["w8a8", "w4a16_g64"])
def test_what_no_engine_has_is_refused_by_name(material: Path, tmp_path: Path, fmt: str) -> None:
    weights = stored(material, tmp_path, [f"{fmt}:duquant(steps=1)"])
    request = Request(
        material / "policy", find_target("orin-jp7"), tmp_path / "packed", weights=weights, pack=True,
        calibration=material / "calibration",
    )  # fmt: skip
    wanted = rf"as {fmt}:duquant\(steps=1\), whose input goes through an operator; engines for orin-jp7 with"
    with pytest.raises(ArtefactError, match=wanted):
        build(request)
