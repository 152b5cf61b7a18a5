"""OpenVINO: one layer in every format against float64, whole decisions against torch, and what it must not do."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch
from choices import with_every_code
from onnx import TensorProto, helper
from ragged import mixed_assignment, observation, write_plan, write_policy

pytest.importorskip("openvino", reason="the extra openvino is not installed")

from calibrator.families import TorchActor
from calibrator.quantizers import parse_choice, quantize_policy
from engine_build.__main__ import main
from engine_build.backends.openvino import probe as probing
from engine_build.backends.openvino.linear import linear
from engine_build.build import Request, build, chosen
from engine_build.graph.builder import GraphBuilder
from engine_build.plan import uniform_plan
from engine_build.weights import Layer, LayerWeights, layers_of
from vla_policy.core.backends.base import Workload
from vla_policy.core.backends.openvino import LARGE, Precision, graphs
from vla_policy.core.backends.openvino.session import OpenVinoSession
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import FULL, Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import find_target

INPUTS, OUTPUTS = 150, 40
ROWS = (1, 7, 290)
LAYER = Layer("stack.layer", "linear", "stack.layer", OUTPUTS, INPUTS, bias=True)
CPU = find_target("cpu")
FLOAT32, BFLOAT16 = Precision.FLOAT32, Precision.BFLOAT16
MIXED = ["w2a16_g32", "w4a16_g32", "w8a16_g32", "w16a16", "w2a16", "w8a16"]


def has_bfloat16() -> bool:
    try:
        graphs.check_processor(BFLOAT16)
    except ArtefactError:
        return False
    return True


needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="this processor has no bfloat16 products")
BACKENDS = ["openvino", pytest.param("openvino_bf16", marks=needs_bfloat16)]


def write_layer(path: Path, fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """A graph of one random layer; its values float64 [out, in] and its bias."""
    generator = torch.Generator().manual_seed(5)
    weight = (torch.randn(OUTPUTS, INPUTS, generator=generator) / INPUTS**0.5).to(torch.bfloat16)
    bias = torch.randn(OUTPUTS, generator=generator).numpy()
    if fmt.weight_bits == 16:
        weights, values = LayerWeights(LAYER, fmt, None, weight, bias), weight.double()
    else:
        quantized = with_every_code(weight, fmt)
        weights, values = LayerWeights(LAYER, fmt, quantized, None, bias), quantized.dequantize().double()
    with GraphBuilder(path) as builder:
        builder.rename(linear(builder, "x", weights), "y")
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", size])
            for name, size in (("x", INPUTS), ("y", OUTPUTS))
        ]
        builder.save(ends[:1], ends[1:])
    return values.numpy(), bias


def products(
    path: Path, fmt: Format, precision: Precision, activations: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and results of the layer at every number of rows, once its weights are seen to stay packed."""
    ready = graphs.compiled(path, precision, 1)
    running = ready.layers[LAYER.name]
    assert (running.weight_bits, running.activations) == (fmt.weight_bits, activations)
    for rows in ROWS:
        x = np.random.default_rng(6).standard_normal((1, rows, INPUTS), np.float32)
        (y,) = ready.model({"x": x}).values()
        yield x, y


@pytest.mark.parametrize("fmt", CPU.on("openvino").legal(), ids=str)
def test_a_layer_is_float64_s_product_and_stays_packed(fmt: Format, tmp_path: Path) -> None:
    values, bias = write_layer(tmp_path / "layer.onnx", fmt)
    for x, y in products(tmp_path / "layer.onnx", fmt, FLOAT32, "f32"):
        # Codes are multiplied by their scales inside the sum or after it.
        allowed = rounding.of_products(x, values, bias, further=2)
        assert (np.abs(y - (x.astype(np.float64) @ values.T + bias)) <= allowed).all(), x.shape


@needs_bfloat16
@pytest.mark.parametrize("fmt", CPU.on("openvino_bf16").legal(), ids=str)
def test_in_bfloat16_values_are_rounded_and_sums_are_not(fmt: Format, tmp_path: Path) -> None:
    values, bias = write_layer(tmp_path / "layer.onnx", fmt)
    for x, y in products(tmp_path / "layer.onnx", fmt, BFLOAT16, "bf16"):
        error = np.abs(y - (x.astype(np.float64) @ values.T + bias))
        # An activation, a weight, its bias and the result are rounded once each.
        assert (error <= 4 * 1.01 * rounding.BFLOAT16 * rounding.magnitude(x, values, bias)).all(), x.shape
        assert (error > rounding.of_products(x, values, bias, further=2)).any(), x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mixed_engine_is_built_verified_and_decides_as_torch(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = write_policy(tmp_path / "policy")
    config = PolicyConfig.load(policy)
    layers = layers_of(config)
    # In bfloat16 OpenVINO keeps the smallest layers at 16 bits; such a plan is refused, see below.
    small = [name for name, layer in layers.items() if backend == "openvino_bf16" and layer.weights <= 32 * 32]
    assignment = mixed_assignment([name for name in layers if name not in small], MIXED) | dict.fromkeys(small, FULL)
    plan = write_plan(tmp_path / "plan.json", sha256_policy(policy), assignment)
    folder, again = tmp_path / "engine", tmp_path / "again"
    for out in (folder, again):
        build(Request(policy, CPU, out, plan=plan, backend=backend))
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert main(["verify", str(folder), "--policy", str(policy), "--samples", "2"]) == 0
    assert "are exactly what policy and plan give" in capsys.readouterr().out

    actor, engine = TorchActor.load(policy), load_engine(folder, threads=1)
    quantize_policy(actor.policy, assignment)
    noise = rounding.NETWORK if backend == "openvino" else 0.1
    for seed in range(3):
        seen = observation(seed)
        decision = actor.act(seen)
        expected, got = actor.scores(seen, decision.tokens), engine.scores(seen, decision)
        np.testing.assert_allclose(got, expected, atol=noise * np.abs(expected).max())
        if backend == "openvino":
            rounding.assert_clear(expected)
            np.testing.assert_array_equal(engine.act(seen).tokens, decision.tokens)


@needs_bfloat16
def test_sixteen_bits_in_bfloat16_are_no_other_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gate, up and down at 16 bits lie so that OpenVINO does not fuse them: it would multiply float16."""
    policy, folder = write_policy(tmp_path / "policy"), tmp_path / "engine"
    build(Request(policy, CPU, folder, uniform=FULL, backend="openvino_bf16"))
    assert {unit.arithmetic for unit in Manifest.load(folder).units} == {
        "FullyConnected, bf16 weights, bf16 activations"
    }
    assert main(["verify", str(folder), "--policy", str(policy), "--samples", "2"]) == 0


@needs_bfloat16
def test_a_layer_that_would_be_unpacked_is_refused_when_it_is_built(tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "policy")
    command = ["build", "--policy", str(policy), "--uniform", "w8a16", "--backend", "openvino_bf16"]
    with pytest.raises(
        ArtefactError, match=r"attn\.proj was planned as w8a16 but runs as w16a16 \(FullyConnected, bf16"
    ):
        main([*command, "--out", str(tmp_path / "engine")])
    assert not (tmp_path / "engine").exists()


def test_a_processor_without_bfloat16_is_refused(engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(graphs.module(), "Core", Core)
    command = ["build", "--policy", str(write_policy(tmp_path / "policy")), "--uniform", "w4a16_g32"]
    with pytest.raises(
        ArtefactError, match=r"has no bfloat16 products .*; take another machine, or build .* openvino`"
    ):
        main([*command, "--backend", "openvino_bf16", "--out", str(tmp_path / "engine")])
    assert not (tmp_path / "engine").exists()
    with pytest.raises(ArtefactError, match=r"has no bfloat16 products"):
        OpenVinoSession(engine, Manifest.load(engine), BFLOAT16)


@needs_bfloat16
def test_the_probe_tells_bfloat16_from_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, real = Format(4, 16, 32), graphs.settings
    probing.probe(fmt, INPUTS, BFLOAT16, tmp_path)
    monkeypatch.setattr(graphs, "settings", lambda precision, threads: real(FLOAT32, threads))
    with pytest.raises(ArtefactError, match=r"off by \d\.\de-07 of the result at 1 rows, bfloat16 gives 0\.0003 to"):
        probing.probe(fmt, INPUTS, BFLOAT16, tmp_path)


def test_the_probe_finds_activations_that_are_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the setting that OpenVINO would choose by itself the description of the graph stays as it is."""
    fmt, real = Format(4, 16, 32), graphs.settings
    probing.probe(fmt, INPUTS, FLOAT32, tmp_path)

    def rounds(precision: Precision, threads: int | None) -> dict[str, object]:
        return real(precision, threads) | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32}

    monkeypatch.setattr(graphs, "settings", rounds)
    if graphs.compiled(tmp_path / f"{fmt}_{INPUTS}.onnx", FLOAT32).layers["probe"].activations != "f32":
        pytest.skip("this processor shows it")
    with pytest.raises(
        ArtefactError, match=r"w4a16_g32 with 150 inputs: OpenVINO .* is off by .* float32 gives 0 to 1e-05"
    ):
        probing.probe(fmt, INPUTS, FLOAT32, tmp_path)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openvino")
    policy = write_policy(folder / "policy")
    command = ["build", "--policy", str(policy), "--uniform", "w4a16_g32", "--backend", "openvino"]
    assert main([*command, "--out", str(folder / "engine")]) == 0
    return folder / "engine"


def test_another_version_is_refused(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vla_policy.core.backends.openvino.session.version", lambda: "2027.1.0")
    with pytest.raises(ArtefactError, match=r"proven with openvino 2026\.\d.*, installed is 2027\.1\.0"):
        load_engine(engine)


def test_a_robot_without_openvino_is_told_what_to_install(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ArtefactError, match=r"backend openvino is not installed .*; pip install 'openvino>=2026"):
        load_engine(engine)


def test_a_processor_that_unpacks_weights_is_refused(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = graphs._running
    monkeypatch.setattr(graphs, "_running", lambda node: replace(real(node), weights="f32", group=None))
    with pytest.raises(ArtefactError, match=r"would be unpacked to f32, proven was w4a16_g32 on .*build the engine on"):
        load_engine(engine)


def test_a_damaged_graph_is_one_line(engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "vision.onnx"
    path.write_bytes((engine / "vision.onnx").read_bytes()[:1000])
    with pytest.raises(ArtefactError, match=r"vision\.onnx: OpenVINO 2026.* cannot load it \(.*\); build it again"):
        graphs.compiled(path, FLOAT32)


def test_the_backend_and_why_stand_in_the_manifest(engine: Path) -> None:
    assert "backend openvino: named with --backend" in Manifest.load(engine).notes


@pytest.mark.parametrize(
    ("formats", "weights", "expected"),
    [
        (["w16a16", "w2a16_g64"], LARGE, "openvino_bf16"),
        (["w16a16", "w2a16_g64"], LARGE - 1, "onnxruntime"),
        (["w16a16"], LARGE, "openvino_bf16"),
    ],
)
@needs_bfloat16
def test_build_takes_bfloat16_for_large_policies(formats: list[str], weights: int, expected: str) -> None:
    assert CPU.fastest_here(Workload(frozenset(map(Format.parse, formats)), weights))[0].backend == expected


def test_without_bfloat16_or_openvino_build_takes_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Workload(frozenset([Format(4, 16, 64)]), LARGE)
    with monkeypatch.context() as without:
        without.setattr(graphs.module().Core, "get_property", lambda *_: ["FP32"])
        assert CPU.fastest_here(large)[0].backend == "onnxruntime"
    monkeypatch.setitem(sys.modules, "openvino", None)
    target, why = CPU.fastest_here(large)
    assert (target.backend, why) == ("onnxruntime", "the default")


def test_a_plan_is_built_for_what_its_latencies_were_measured_with() -> None:
    layers = {LAYER.name: LAYER}
    plan = replace(uniform_plan(parse_choice("w4a16_g32"), layers), backend="openvino")
    target, why = chosen(CPU, None, plan, layers)
    assert (target.backend, why) == ("openvino", "the plan's latencies were measured with it")
    assert chosen(CPU, "onnxruntime", plan, layers)[0].backend == "onnxruntime"


def test_units_and_calls_are_kept_apart(engine: Path) -> None:
    """Two decisions in turns give what each gives alone: nothing kept is overwritten while it is needed."""
    loaded = load_engine(engine, threads=1)
    alone = [loaded.act(observation(seed)).tokens for seed in range(2)]
    for seed in (0, 1, 0, 1):
        np.testing.assert_array_equal(loaded.act(observation(seed)).tokens, alone[seed])
    assert {unit.realised for unit in Manifest.load(engine).units} == {"w4a16_g32", "w4a16"}
