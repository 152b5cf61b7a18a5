"""TensorRT: its dialect's numbers on ONNX Runtime, codes found in engine bytes, a real sm_80 engine without a GPU."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import rounding
import torch
from choices import rtn, with_every_code
from fake_gpu import literal_options
from onnx import TensorProto, helper
from pi05_policy import tiny_pi05_folder
from ragged import observation, write_plan

from calibrator.data.calibration import collect, load_calibration
from calibrator.data.records import Record, SourceIndex, Trajectory
from calibrator.families.loading import open_checkpoint
from calibrator.quantizers import Computed, quantize
from calibrator.quantizers.packing import pack
from engine_build import exported
from engine_build.backends import find_backend
from engine_build.backends.base import ReadBack, Written
from engine_build.backends.onnxruntime.linear import linear as linear_onnxruntime
from engine_build.backends.tensorrt.builder import input_shapes
from engine_build.backends.tensorrt.linear import linear
from engine_build.build import Policy, Request, build, export_graphs
from engine_build.graph.builder import GraphBuilder
from engine_build.graph.context import GraphContext
from engine_build.plan import Plan, check_legal, legalize, uniform_plan
from engine_build.ranges import input_peaks
from engine_build.verify import verify
from engine_build.weights import Layer, LayerWeights, layers_of
from vla_policy.core.backends.onnxruntime.session import open_session
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest, file_records
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prismatic.pixels import preprocess
from vla_policy.core.program import Call, GraphSpec, TensorSpec, profiles
from vla_policy.core.targets import find_target

A100, ORIN = find_target("a100"), find_target("orin-jp7")
INPUTS, OUTPUTS = 150, 40
INPUT_PEAK = 3.0
LAYER = Layer("stack.layer", "linear", "stack.layer", OUTPUTS, INPUTS, bias=True)


class FakeStates:
    """One trajectory of random states."""

    path = "fake"

    def index(self) -> SourceIndex:
        return SourceIndex((Trajectory("episode", 8, tuple(range(8))),), {})

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[Record]:
        for step in sorted(wanted["episode"]):
            yield Record("episode", step, observation(step))

    def describe(self) -> dict[str, Any]:
        return {"kind": "fake", "path": self.path}


def write_graph(path: Path, fmt: Format) -> tuple[torch.Tensor, np.ndarray]:
    """One layer in TensorRT's dialect; its weight as the format rounds it, and its bias."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator) / INPUTS**0.5
    bias = torch.randn(OUTPUTS, generator=generator).half().float().numpy()
    quantized = with_every_code(weight, fmt) if fmt.weight_bits < 16 else None
    weights = LayerWeights(LAYER, fmt, quantized, None if quantized else weight, bias, INPUT_PEAK)
    with GraphBuilder(path, TensorProto.FLOAT16) as builder:
        builder.rename(linear(builder, "x", weights), "y")
        x, y = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, "tokens", size])
            for name, size in (("x", INPUTS), ("y", OUTPUTS))
        )
        builder.save([x], [y])
    return quantized.dequantize() if quantized else weight, bias


@pytest.mark.parametrize("fmt", A100.legal(), ids=str)
def test_the_dialect_computes_the_planned_numbers(fmt: Format, tmp_path: Path) -> None:
    weight, bias = write_graph(tmp_path / "layer.onnx", fmt)
    x = torch.randn(1, 7, INPUTS, generator=torch.Generator().manual_seed(6)).half()
    (y,) = open_session(tmp_path / "layer.onnx", literal_options()).run(None, {"x": x.numpy()})
    seen = x.double()
    if fmt.activation_bits == 8:
        step = float(np.float16(INPUT_PEAK / 127))
        seen = (seen / step).round().clamp(-128, 127) * step
    expected = (seen @ weight.double().T).numpy() + bias
    # Codes times scales are float16 before they are multiplied, sums are float32, and float16 again behind them and
    # with the bias: a rounding of every product, and two of the result.
    product, size = expected - bias, rounding.magnitude(seen.numpy(), weight.numpy())
    allowed = rounding.HALF * (1.01 * size + np.abs(product) + np.abs(expected))
    assert (np.abs(y - expected) <= allowed).all()


def test_an_odd_row_of_two_bit_codes_is_paired(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    quantized = quantize(torch.randn(6, 7, generator=generator), rtn(Format(2, 16)))
    layer = Layer("odd", "linear", "odd", 6, 7, bias=False)
    with GraphBuilder(tmp_path / "odd.onnx", TensorProto.FLOAT16) as builder:
        builder.rename(linear(builder, "x", LayerWeights(layer, Format(2, 16), quantized, None, None)), "y")
        sizes = {"x": 7, "y": 6}
        infos = [helper.make_tensor_value_info(key, TensorProto.FLOAT16, [1, 7, size]) for key, size in sizes.items()]
        builder.save(infos[:1], infos[1:])
    (y,) = open_session(tmp_path / "odd.onnx", literal_options()).run(None, {"x": np.eye(7, dtype=np.float16)[None]})
    # One input is 1 and the others are 0: the weight itself, rounded to float16 once.
    np.testing.assert_allclose(y[0].T, quantized.dequantize().numpy(), rtol=rounding.HALF)


def test_weights_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    layer = Layer("large", "linear", "large", 1, 2, bias=False)
    rows = torch.tensor([[1e5, 1.0]])
    message = r"large.weight: holds numbers that are not finite in float16"
    with (
        GraphBuilder(tmp_path / "large.onnx", TensorProto.FLOAT16) as builder,
        pytest.raises(ArtefactError, match=message),
    ):
        linear(builder, "x", LayerWeights(layer, Format(16, 16), None, rows, None))


def test_codes_whose_weights_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    """1e5 = 7 codes of a scale that fits; multiplied in float16 they are infinite, in ONNX Runtime's float32 not."""
    layer = Layer("large", "linear", "large", 1, 32, bias=False)

    class OneWeight:
        def tensor(self, name: str) -> torch.Tensor:
            return torch.full((1, 32), 1e5)

    for float_type, write in ((TensorProto.FLOAT, linear_onnxruntime), (TensorProto.FLOAT16, linear)):
        with GraphBuilder(tmp_path / f"{float_type}.onnx", float_type) as builder:
            plan = {"large": rtn(Format(4, 16, 32))}
            context = GraphContext(
                builder, OneWeight(), {"large": layer}, plan, Computed(), write, lambda *layer: None, {}, False
            )
            if float_type == TensorProto.FLOAT:
                context.linear("x", "large")
                continue
            with pytest.raises(ArtefactError, match=r"large: its weights reach 1e\+05, not finite in .*float16"):
                context.linear("x", "large")


@pytest.mark.parametrize("fmt", [fmt for fmt in A100.legal() if fmt.weight_bits < 16], ids=str)
def test_codes_are_found_wherever_they_stand_and_missed_when_altered(fmt: Format, tmp_path: Path) -> None:
    graph, engine = tmp_path / "layer.onnx", tmp_path / "layer.engine"
    write_graph(graph, fmt)
    tensors = {tensor.name: tensor for tensor in onnx.load(str(graph)).graph.initializer}
    codes = tensors["stack.layer.codes"].raw_data
    noise = np.random.default_rng(0).bytes(4 * 37)
    engine.write_bytes(noise + codes + noise)
    found = read_back(graph, engine, {LAYER.name: LAYER}, {LAYER.name: fmt})
    assert found.layers[LAYER.name].format == fmt
    assert found.tensors == {f"{LAYER.name}.codes"}
    engine.write_bytes(noise + codes[:-1] + bytes([codes[-1] ^ 0x10]) + noise)
    with pytest.raises(ArtefactError, match=r"codes of 1 layers are not in the engine, e.g. stack.layer, planned"):
        read_back(graph, engine, {LAYER.name: LAYER}, {LAYER.name: fmt})


def test_layers_of_one_input_are_found_side_by_side(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    codes = {name: rng.integers(-8, 8, (24, 32)).astype(np.int8) for name in "qkv"}
    layers = {name: Layer(name, "linear", "qkv", 32, 24, bias=False) for name in codes}
    with GraphBuilder(tmp_path / "rows.onnx", TensorProto.FLOAT16) as builder:
        for name, values in codes.items():
            builder.raw(f"{name}.codes", TensorProto.INT4, values.shape, pack(values, 4))
        builder.save([], [])
    engine, planned = tmp_path / "rows.engine", dict.fromkeys(layers, Format(4, 16))
    beside = np.hstack(list(codes.values()))
    engine.write_bytes(bytes(20) + pack(beside, 4))
    found = read_back(tmp_path / "rows.onnx", engine, layers, planned)
    assert {realised.format for realised in found.layers.values()} == {Format(4, 16)}
    beside[23, 95] ^= 1
    engine.write_bytes(bytes(20) + pack(beside, 4))
    with pytest.raises(ArtefactError, match=r"codes of 1 layers are not in the engine, e.g. v, planned"):
        read_back(tmp_path / "rows.onnx", engine, layers, planned)


def rehash(engine: Path, manifest: Manifest) -> None:
    replace(manifest, files=file_records(engine)).write(engine)


def export_again(manifest: Manifest, policy: Path, folder: Path) -> Path:
    folder.mkdir()
    config, planned = manifest.config, {unit.name: unit.choice for unit in manifest.units}
    with open_checkpoint(policy, config) as checkpoint:
        source = Policy(config, checkpoint, policy, manifest.parents["policy"])
        export_graphs(folder, source, layers_of(config), planned, find_backend(manifest.backend).dialect((1, 7)))
    return folder


def stored(graph: Path, name: str) -> np.ndarray:
    (tensor,) = (one for one in onnx.load(str(graph)).graph.initializer if one.name == name)
    return np.frombuffer(tensor.raw_data, np.uint8).reshape(tensor.dims[0], -1)


def alter(engine: Path, tensor: np.ndarray) -> bytes:
    """Flips one bit of a tensor wherever it stands, as it is or, of float16, transposed; returns what stood there."""
    before = engine.read_bytes()
    turned = np.ascontiguousarray(tensor.view(np.uint16).T).tobytes()
    changed = bytearray(before)
    for content in {tensor.tobytes(), turned}:
        place = before.find(content)
        while place >= 0:
            changed[place + len(content) // 2] ^= 1
            place = before.find(content, place + 1)
    assert changed != before
    engine.write_bytes(changed)
    return before


def test_an_a100_engine_is_built_without_a_gpu(workshop: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds sm_80 engines anywhere once it is installed")
    request = Request(workshop / "policy", A100, tmp_path / "engine", plan=workshop / "plan.json", legalize=True)
    manifest = build(request)
    assert Manifest.load(tmp_path / "engine") == manifest
    assert sorted(path.name for path in (tmp_path / "engine").iterdir()) == [
        "decoder.engine",
        "exported.json",
        "manifest.json",
        "tokenizer.json",
        "vision.engine",
    ]
    assert {unit.planned for unit in manifest.units} >= {"w2a16_g32", "w4a16_g32", "w16a16"}
    assert any("w8a16_g32 -> w8a16 " in change for change in manifest.legalized)
    assert "not run where it was built" in manifest.notes[-1]
    found = verify(tmp_path / "engine", workshop / "policy", None)
    _, graphs = exported.load(tmp_path / "engine")
    tensors = {name: tensor for graph in graphs.values() for name, tensor in graph.tensors.items()}
    every = [tensor for graph in graphs.values() for tensor in graph.tensors.values()]
    assert (found.tensors, found.bytes) == (len(every), sum(tensor.bytes for tensor in every))
    assert found.not_compared.startswith("what the builder merged") and not found.ran_on_target
    # All codes, and nearly all of the rest: norms, scales, biases, embeddings and 16-bit weights.
    stand = {name for name, tensor in tensors.items() if tensor.found}
    assert stand >= {f"{unit.name}.codes" for unit in manifest.units if unit.planned != "w16a16"}
    assert stand >= {f"{unit.name}.weight" for unit in manifest.units if unit.planned == "w16a16"}
    tables = sum(tensors[f"rotary.{name}"].bytes for name in ("cosine", "sine"))  # the builder keeps them otherwise
    assert sum(tensor.bytes for tensor in every if tensor.found) > 0.98 * (found.bytes - tables)
    written = export_again(manifest, workshop / "policy", tmp_path / "written")
    for name in (
        "vision_backbone.featurizer.blocks.0.norm1.weight",
        "language_model.model.embed_tokens.weight",
        next(name for name in sorted(stand) if name.startswith("vision") and name.endswith("proj.weight")),
        next(name for name in sorted(stand) if name.endswith(".scales")),
    ):
        graph = next(graph for graph, spec in graphs.items() if name in spec.tensors)
        path = tmp_path / "engine" / f"{graph}.engine"
        content = alter(path, stored(written / f"{graph}.onnx", name))
        rehash(tmp_path / "engine", manifest)
        with pytest.raises(ArtefactError, match=rf"engine: {name} of graph {graph}: not as policy and plan give them"):
            verify(tmp_path / "engine", workshop / "policy", None)
        path.write_bytes(content)
    engine = tmp_path / "engine" / "decoder.engine"
    engine.write_bytes(bytes(engine.stat().st_size))
    rehash(tmp_path / "engine", manifest)
    with pytest.raises(ArtefactError, match="are not in the engine"):
        verify(tmp_path / "engine", workshop / "policy", None)


def test_activation_scales_come_from_the_calibration_set(workshop: Path, tmp_path: Path) -> None:
    collect([FakeStates()], tmp_path / "calibration", count=4, seed=0)
    names = ["projector.fc2", "vision_backbone.featurizer.patch_embed.proj"]
    peaks = input_peaks(workshop / "policy", tmp_path / "calibration", names)
    config = Manifest.load(workshop / "engine").config
    states = load_calibration(tmp_path / "calibration")
    pixels = max(np.abs(preprocess(states.images[index], config)[:3]).max() for index in range(4))
    assert peaks["vision_backbone.featurizer.patch_embed.proj"] == pytest.approx(pixels)
    assert peaks["projector.fc2"] > 0


def test_eight_bit_activations_need_a_calibration_set(workshop: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds sm_80 engines anywhere once it is installed")
    request = Request(workshop / "policy", A100, tmp_path / "engine", uniform=rtn(Format(8, 8)))
    with pytest.raises(ArtefactError, match=r"36 layers have 8-bit activations, .* name states .* --calibration"):
        build(request)
    collect([FakeStates()], tmp_path / "calibration", count=4, seed=0)
    manifest = build(replace(request, calibration=tmp_path / "calibration"))
    assert {unit.realised for unit in manifest.units} == {"w8a8"}
    assert len(manifest.input_peaks) == 36


def test_fused_layers_must_share_a_format(workshop: Path, tmp_path: Path) -> None:
    layers = layers_of(Manifest.load(workshop / "engine").config)
    query = "language_model.model.layers.0.self_attn.q_proj"
    key = "language_model.model.layers.0.self_attn.k_proj"
    plan = uniform_plan(rtn(Format(4, 16, 32)), layers)
    mixed = Plan(plan.assignment | {key: rtn(Format(8, 16))})
    with pytest.raises(ArtefactError, match="target a100 fuses layers of one input, which must share a format"):
        check_legal(mixed, layers, A100)
    raised = legalize(mixed, layers, A100)
    assert str(raised.assignment[query]) == "w8a16:rtn"
    check_legal(raised, layers, A100)


def test_profiles_cover_prefill_and_decode(workshop: Path) -> None:
    """Of an engine for the CPU, whose cache grows."""
    manifest = Manifest.load(workshop / "engine")
    prefill, step = profiles("decoder", manifest.graphs, manifest.program)
    assert (prefill.call, step.call) == ("prefill", "step")
    assert profiles("vision", manifest.graphs, manifest.program) == []
    shapes, again = (input_shapes(manifest.graphs["decoder"], one.sizes) for one in (prefill, step))
    assert shapes["patches"] == ((1, 16, 64),) * 3
    assert again["rows"] == ((1, 1),) * 3
    smallest, typical, largest = again["past_value_1"]
    assert smallest[2] < typical[2] < largest[2]


@pytest.mark.parametrize(
    ("target", "backend", "ops"),
    [
        ("a100", None, {"TensorScatter": 4, "RotaryEmbedding": 4}),
        ("orin-jp7", None, {"TensorScatter": 4, "RotaryEmbedding": 4}),
        ("h100", None, {}),
        ("orin-jp6", None, {}),
    ],
)
def test_a_sequence_is_written_in_the_layers_of_the_release(
    workshop: Path, tmp_path: Path, target: str, backend: str | None, ops: dict[str, int]
) -> None:
    """TensorRT 10.15 brought layers for caches and rotary positions; before it, new rows are outputs. No size is open,
    none is zero, and operator set and format version are the lowest that have the operators."""
    where = find_target(target).on(backend)
    build(Request(workshop / "policy", where, tmp_path / "packed", uniform=rtn(Format(8, 16)), pack=True))
    manifest = Manifest.load(tmp_path / "packed")
    model = onnx.load(str(tmp_path / "packed" / "decoder.onnx"), load_external_data=False)
    found = Counter(node.op_type for node in model.graph.node)
    assert {name: found[name] for name in ("TensorScatter", "RotaryEmbedding") if found[name]} == ops
    assert (model.opset_import[0].version, model.ir_version) == ((24, 12) if ops else (21, 10))
    step = manifest.program["step"]
    assert (len(step.carried), len(step.appended)) == ((4, 0) if ops else (0, 4))
    shapes = [
        shape for one in profiles("decoder", manifest.graphs, manifest.program)
        for bounds in input_shapes(manifest.graphs["decoder"], one.sizes).values() for shape in set(bounds)
    ]  # fmt: skip
    assert sorted(shapes) == [(1, 1), (1, 48), (1, 80), (1, 112), (1, 144)]
    assert verify(tmp_path / "packed", workshop / "policy", None).not_compared == ""


@pytest.mark.parametrize("family", ["openvla", "pi05"])
def test_the_plain_forms_of_a_sequence_build_as_real_engines(family: str, workshop: Path, tmp_path: Path) -> None:
    """As TensorRT 10.3 gets them, by TensorRT-RTX for want of the other: caches that rows are appended to."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds sm_80 engines anywhere once it is installed")
    policy = workshop / "policy" if family == "openvla" else tiny_pi05_folder(tmp_path / "policy")
    config, rtx = PolicyConfig.load(policy), find_backend("tensorrt_rtx")
    layers = layers_of(config)
    plan, dialect = dict.fromkeys(layers, rtn(Format(4, 16, 64))), find_backend("tensorrt").dialect((10, 3))
    (tmp_path / "written").mkdir()
    with open_checkpoint(policy, config) as checkpoint:
        written = export_graphs(tmp_path / "written", Policy(config, checkpoint, policy, "0"), layers, plan, dialect)
    built = rtx.compile(written, A100, tmp_path)
    assert all((tmp_path / "written" / spec.file).stat().st_size > 0 for spec in built.values())


def test_a_graph_that_would_read_an_input_on_the_host_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds sm_80 engines anywhere once it is installed")
    with GraphBuilder(tmp_path / "graph.onnx", TensorProto.FLOAT16) as builder:
        places = builder.node("Range", [builder.constant(0, np.int64), "end", builder.constant(1, np.int64)])
        builder.rename(builder.cast(places, TensorProto.FLOAT16), "y")
        builder.save(
            [helper.make_tensor_value_info("end", TensorProto.INT64, [])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n"])],
        )
    graph = GraphSpec("graph.onnx", (TensorSpec("end", "int64", (), "a number"),), ())
    written = Written(tmp_path, {"graph": graph}, {"go": Call("graph", {}, {})}, {})
    with pytest.raises(ArtefactError, match="takes end for a shape, which it would read on the host"):
        find_backend("tensorrt_rtx").compile(written, A100, tmp_path)


def test_a_backend_that_is_not_installed_is_named(workshop: Path, tmp_path: Path) -> None:
    try:
        find_backend("tensorrt").version()
    except ArtefactError as error:
        assert "install TensorRT on the device" in str(error)
    else:
        pytest.skip("TensorRT is installed here")
    request = Request(workshop / "policy", ORIN, tmp_path / "engine", uniform=rtn(Format(16, 16)))
    with pytest.raises(ArtefactError, match="backend tensorrt is not installed"):
        build(request)
    assert list(tmp_path.iterdir()) == []


def read_back(graph: Path, engine: Path, layers: dict[str, Layer], planned: dict[str, Format]) -> ReadBack:
    return find_backend("tensorrt_rtx").read_back(graph, engine, layers, planned, graph.parent)


def record_of(engine: Path) -> dict[str, Any]:
    """What the stand-in was asked for when it "built" the engine."""
    content: dict[str, Any] = json.loads(engine.read_bytes().rpartition(b"\nRECORD ")[2])
    return content


@pytest.mark.usefixtures("device")
def test_on_the_device_the_timing_cache_is_kept_and_hashed(workshop: Path, tmp_path: Path) -> None:
    request = Request(workshop / "policy", ORIN, tmp_path / "engine", uniform=rtn(Format(8, 16)))
    first = build(request)
    assert (first.target, first.backend, first.backend_version) == ("orin-jp7", "tensorrt", "11.4.1")
    vision, decoder = (record_of(tmp_path / "engine" / f"{name}.engine") for name in ("vision", "decoder"))
    assert len(vision.pop("layers")) + len(decoder.pop("layers")) > len(first.units)
    assert vision == {"profiles": 0, "flags": 2, "cache": "", "plugins": [], "debug": []}
    assert decoder == {"profiles": 5, "flags": 2, "cache": "+", "plugins": [], "debug": []}
    assert (tmp_path / "engine" / "timing.cache").read_bytes() == b"++"
    assert "timing.cache" in first.files
    build(request)
    assert record_of(tmp_path / "engine" / "vision.engine")["cache"] == "++"
    (tmp_path / "engine" / "timing.cache").write_bytes(b"from elsewhere")
    with pytest.raises(ArtefactError, match=r"timing.cache: 14 bytes, expected \d+; .* or delete timing.cache there"):
        build(request)


def plugin_format(layer: Layer) -> Format:
    """Of the decoder's layers; the vision towers' take none."""
    if layer.kind in ("encoder", "patch_embed"):
        return Format(8, 16)
    return Format(2, 16, 32) if "mlp" in layer.name else Format(4, 8, 32)


@pytest.mark.usefixtures("device")
def test_plugin_formats_are_in_the_engine_byte_for_byte(workshop: Path, tmp_path: Path) -> None:
    layers = layers_of(Manifest.load(workshop / "engine").config)
    assignment = {name: rtn(plugin_format(layer)) for name, layer in layers.items()}
    plan = write_plan(tmp_path / "plan.json", sha256_policy(workshop / "policy"), assignment)
    request = Request(workshop / "policy", ORIN, tmp_path / "engine", plan=plan)
    manifest = build(request)
    # gate and up in one launch, q, k and v in one
    names = ["quantize_rows", "w2a16", "w2a16_x2", "w4a8", "w4a8_x3"]
    assert record_of(tmp_path / "engine" / "decoder.engine")["plugins"] == names
    assert {unit.realised for unit in manifest.units} >= {"w2a16_g32", "w4a8_g32"}
    assert all(unit.arithmetic.endswith("by plugin") == (unit.realised != "w8a16") for unit in manifest.units)
    assert verify(tmp_path / "engine", workshop / "policy", None).tensors > len(manifest.units)


def test_plugin_formats_need_the_backend_that_takes_plugins() -> None:
    wanted = Format(4, 8, 128)
    why = "tensorrt_rtx has no kernel for w4a8 and takes none of ours; build with --backend tensorrt"
    assert A100.why_not(wanted) == why
    assert A100.on("tensorrt").why_not(wanted) is None
    assert ORIN.why_not(wanted) is None
    why = "no kernel runs w4a8 on layers of kind encoder with tensorrt 11.4.1"
    assert ORIN.why_not(wanted, "encoder") == why


@pytest.mark.usefixtures("device")
def test_a_crash_of_the_builder_is_one_line_and_leaves_nothing(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path" / "tensorrt").mkdir(parents=True)
    crash = "import os, signal\n__version__ = '11.4.1'\ndef Builder(logger): os.kill(os.getpid(), signal.SIGSEGV)\n"
    crash += "class ILogger: ERROR = 1\n"
    (tmp_path / "path" / "tensorrt" / "__init__.py").write_text(crash)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    (tmp_path / "out").mkdir()
    request = Request(workshop / "policy", ORIN, tmp_path / "out" / "engine", uniform=rtn(Format(8, 16)))
    with pytest.raises(ArtefactError, match=r"vision.onnx: tensorrt crashed while building \(Segmentation fault\)"):
        build(request)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_backend_of_another_target_is_refused(workshop: Path, tmp_path: Path) -> None:
    request = Request(workshop / "policy", ORIN, tmp_path / "engine", backend="tensorrt_rtx")
    with pytest.raises(ArtefactError, match="target orin-jp7 cannot run backend tensorrt_rtx; choose tensorrt"):
        build(request)
