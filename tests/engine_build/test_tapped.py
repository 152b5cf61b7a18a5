"""Layers of a TensorRT engine shown by a stand-in for its GPU, beside torch and beside their own stored codes."""

from pathlib import Path

import numpy as np
import pytest
import rounding
import torch
from choices import with_every_code
from fake_gpu import VERSION, fake_modules
from onnx import TensorProto, helper
from ragged import mixed_assignment, write_policy

from calibrator.data.statistics import watched_peaks
from calibrator.families import TorchActor
from calibrator.families.loading import open_checkpoint
from calibrator.quantizers import Computed, InputScales, quantize_policy
from calibrator.quantizers.activations import quantize_activation
from engine_build.backends import find_backend
from engine_build.backends.base import Layer, Seen, Written, taps_of
from engine_build.backends.tensorrt import linear_plugin, tapped
from engine_build.backends.tensorrt.stored import StoredGraph
from engine_build.build import Policy, export_graphs
from engine_build.compiled import as_packed, unit_records
from engine_build.golden import Golden
from engine_build.graph.builder import GraphBuilder
from engine_build.layerwise import check_layers
from engine_build.reference import expected_of, reference_states
from engine_build.stored_layers import check_stored_layers
from engine_build.weights import LayerWeights, layers_of
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION, Format
from vla_policy.core.manifest import Manifest, file_records
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.program import Session
from vla_policy.core.targets import find_target

FORMS = ["w4a16_g64", "w8a16", "w8a8", "w16a16"]
INPUTS, OUTPUTS = 150, 40


class Shop:
    """A policy's graphs in TensorRT's dialect, its torch twin, and golden states."""

    def __init__(self, folder: Path) -> None:
        policy = write_policy(folder / "policy")
        config = PolicyConfig.load(policy)
        layers, backend = layers_of(config), find_backend("tensorrt")
        plan = mixed_assignment(list(layers), FORMS)
        (folder / "written").mkdir()
        self.actor = TorchActor.load(policy)
        self.states = reference_states(config, self.actor.unnorm_key, None, 2, 0)
        peaks = {name: 0.0 for name, choice in plan.items() if choice.format == Format(8, 8)}
        with watched_peaks(self.actor.policy, peaks):
            full = expected_of(self.actor, self.states, "full")
        with open_checkpoint(policy, config) as checkpoint:
            source = Policy(config, checkpoint, policy, "0", peaks)
            self.written = export_graphs(folder / "written", source, layers, plan, backend.dialect((11, 4, 1)))
        for name in config.family.files:
            (folder / "written" / name).write_bytes((policy / name).read_bytes())
        formats = {name: choice.format for name, choice in plan.items()}
        units = unit_records(self.written, as_packed(self.written, layers, formats), layers, plan)
        graphs, program = dict(self.written.graphs), dict(self.written.program)
        files, parents = file_records(folder / "written"), {"policy": "0"}
        self.manifest = Manifest(
            "orin-jp7", "tensorrt", VERSION, "0", graphs, program, units, files, parents, config.raw, 0,
            input_peaks=peaks,
        )  # fmt: skip
        quantize_policy(self.actor.policy, plan, Computed(), InputScales(find_target("orin-jp7"), peaks))
        same = expected_of(self.actor, self.states, "same")
        self.golden = Golden("random", self.actor.unnorm_key, tuple(self.states), same, full)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("tapped"))


@pytest.fixture
def gpu(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that "were built" to show values are run by the stand-in, which knows what was marked."""

    def opened(
        module: object, target: object, written: Written, manifest: Manifest, taps: dict[str, list[str]], seen: Seen,
        scratch: Path,
    ) -> Session:  # fmt: skip
        inputs = {name: {spec.name for spec in graph.inputs} for name, graph in written.graphs.items()}
        marked = {graph: [name for name in names if name not in inputs[graph]] for graph, names in taps.items()}
        modules = fake_modules(written.folder, manifest, (8, 7), debug=marked)
        return tapped.TappedSession(written.folder, manifest, modules, taps, seen)

    monkeypatch.setattr(tapped, "open_tapped", opened)


def test_every_layer_is_compared_with_torch_by_its_own_format(shop: Shop, gpu: None, tmp_path: Path) -> None:
    backend = find_backend("tensorrt")
    found = check_layers(
        shop.written.folder, shop.manifest, shop.written, backend, shop.actor, shop.states, tmp_path
    )
    assert found is not None and set(found.formats) == set(FORMS)
    for name, worst in found.formats.items():
        assert 0 < worst.error < worst.allowed == (0.01 if name == "w8a8" else 0.005), name
    assert 0 < found.between.error < found.between.allowed == 0.005


def test_every_layer_is_compared_with_its_stored_codes(shop: Shop, gpu: None) -> None:
    found = check_stored_layers(shop.written, shop.manifest, shop.golden)
    assert set(found.formats) == set(FORMS)
    assert all(0 < worst.error < 0.002 < worst.allowed for worst in found.formats.values())


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_computes_something_else_is_named(
    shop: Shop, gpu: None, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """A kernel that is 2 % off: whole decisions of a policy with 8-bit activations would hide it."""
    name = [unit.name for unit in shop.manifest.units if unit.planned == form][-1]
    place, tell = shop.written.places[name], tapped.TappedSession._tell

    def off(self: tapped.TappedSession, address: int, dtype: object, shape: tuple[int, ...], value: str) -> None:
        tell(self, address, dtype, shape, value)
        if value == place.result:
            self._told[value] = self._told[value] * np.float16(1.02)

    monkeypatch.setattr(tapped.TappedSession, "_tell", off)
    with pytest.raises(ArtefactError, match=rf"{name} \({form}\): its result differs from what its stored codes give"):
        check_stored_layers(shop.written, shop.manifest, shop.golden)


def test_real_engines_are_built_to_show_every_layer(shop: Shop, tmp_path: Path) -> None:
    """By TensorRT-RTX, without a GPU: every value that a layer takes or gives can be marked."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds sm_80 engines anywhere once it is installed")
    from engine_build.backends.tensorrt.builder import build_engines
    from engine_build.backends.tensorrt_rtx import BACKEND
    from engine_build.compiled import linked

    taps = taps_of(shop.written.places)
    with linked(shop.written, tmp_path) as here:
        plain = build_engines(BACKEND.module, find_target("a100"), here, tmp_path)
        sizes = {name: (tmp_path / spec.file).stat().st_size for name, spec in plain.items()}
        shown = build_engines(BACKEND.module, find_target("a100"), here, tmp_path, taps)
        # Nothing is fused across a marked value, so that the engine has more layers to tell of.
        assert all((tmp_path / spec.file).stat().st_size > sizes[name] for name, spec in shown.items())
        with pytest.raises(ArtefactError, match="has no value nonsense to show"):
            build_engines(BACKEND.module, find_target("a100"), here, tmp_path, {"vision": ["nonsense"]})


@pytest.mark.parametrize("fmt", find_target("orin-jp7").legal(), ids=str)
def test_stored_tensors_give_the_planned_numbers(fmt: Format, tmp_path: Path) -> None:
    """Every form in which a layer is written, read back by NumPy alone, beside the calibrator's weights in float64."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator) / INPUTS**0.5
    bias = torch.randn(OUTPUTS, generator=generator).half().float().numpy()
    layer, peak = Layer("stack.layer", "linear", "stack.layer", OUTPUTS, INPUTS, bias=True), 3.0
    quantized = None if fmt == FULL_PRECISION else with_every_code(weight, fmt)
    weights = LayerWeights(layer, fmt, quantized, None if quantized else weight, bias, peak)
    with GraphBuilder(tmp_path / "layer.onnx", TensorProto.FLOAT16) as builder:
        builder.rename(linear_plugin.linear(builder, "x", weights), "y")
        infos = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, "tokens", size])
            for name, size in (("x", INPUTS), ("y", OUTPUTS))
        ]
        builder.save(infos[:1], infos[1:])
    x = torch.randn(7, INPUTS, generator=generator).half()
    seen = x.double()
    if fmt == Format(8, 8):
        step = float(np.float16(peak / 127))
        seen = (seen / step).round().clamp(-128, 127) * step
    elif fmt.activation_bits == 8:
        seen = quantize_activation(x.float(), 8).double()
    kept = quantized.dequantize() if quantized is not None else weight.half()
    expected = (seen @ kept.double().T).numpy() + bias
    y = StoredGraph(tmp_path / "layer.onnx").result(layer, fmt, x.numpy())
    size = rounding.magnitude(seen.numpy(), kept.float().numpy()) + np.abs(bias)
    np.testing.assert_array_less(np.abs(y - expected), INPUTS * rounding.SINGLE * size + 1e-9)


def test_an_unknown_layer_is_named(shop: Shop) -> None:
    graph = shop.written.folder / shop.written.graphs["vision"].file
    layer = Layer("no.layer", "linear", "no.layer", 1, 1, bias=False)
    with pytest.raises(ArtefactError, match=r"vision\.onnx: holds no no\.layer\.weight; build the engine again"):
        StoredGraph(graph).result(layer, FULL_PRECISION, np.zeros((1, 1)))
