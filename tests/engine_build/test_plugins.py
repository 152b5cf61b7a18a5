"""The whole way of a plugin layer: exporter, graph, registered plugin, launch, kernel; numbers against float64."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import rounding
import torch
from choices import with_every_code
from cpu_kernels import run_kernel
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from calibrator.quantizers.activations import quantize_activation
from engine_build.backends import find_backend
from engine_build.backends.tensorrt import plugin_family, plugins
from engine_build.backends.tensorrt.kernels import Kernel
from engine_build.backends.tensorrt.linear_plugin import linear
from engine_build.compiled import planned_bytes
from engine_build.graph.builder import GraphBuilder
from engine_build.weights import Layer, LayerWeights
from vla_policy.core.formats import Format
from vla_policy.core.manifest import UnitRecord
from vla_policy.core.targets import find_target

INPUTS, OUTPUTS = 150, 40
ORIN = find_target("orin-jp7")
FORMATS = [fmt for fmt in ORIN.legal() if plugin_family(fmt)]
TENSORRT = {"float16": "FP16", "float32": "FP32", "int32": "INT32"}


def layer(name: str) -> Layer:
    return Layer(name, "linear", name, OUTPUTS, INPUTS, bias=True)


def layer_weights(name: str, fmt: Format, seed: int) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator) / INPUTS**0.5
    bias = torch.randn(OUTPUTS, generator=generator).half().float().numpy()
    return LayerWeights(layer(name), fmt, with_every_code(weight, fmt), None, bias)


@pytest.fixture
def registry(device: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugins, registered with a stand-in for TensorRT; the compiler's part is `test_kernels`."""
    monkeypatch.setattr(plugins, "compile_ptx", lambda kernel, capability: kernel)
    plugins.register.__wrapped__((8, 7))
    return sys.modules["tensorrt.plugin"]


class Machine:
    """Executes a graph: plugins by their kernels on the CPU, launched as they ask, all else by ONNX's reference."""

    def __init__(self, trtp: Any, choose: Callable[[list[int]], int]) -> None:
        self.trtp, self.choose = trtp, choose
        self.launched: list[str] = []

    def run(self, path: Path, x: np.ndarray) -> np.ndarray:
        graph = onnx.load(str(path)).graph
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer} | {"x": x}
        for node in graph.node:
            inputs = [values[name] for name in node.input]
            run = self.plugin if node.domain else self.reference
            values |= dict(zip(node.output, run(node, inputs), strict=True))
        return values["y"]

    def reference(self, node: onnx.NodeProto, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return ReferenceEvaluator(node).run(None, dict(zip(node.input, inputs, strict=True)))

    def plugin(self, node: onnx.NodeProto, inputs: list[np.ndarray]) -> list[np.ndarray]:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes["aot"] == 1
        plugin = self.trtp.REGISTRY[f"{attributes['plugin_namespace'].decode()}::{node.op_type}"]
        dtype = sys.modules["tensorrt"].DataType
        types = {"float16": dtype.HALF, "float32": dtype.FLOAT, "int32": dtype.INT32}
        seen = [self.trtp.from_shape_expr(value.shape, types[value.dtype.name]) for value in inputs]
        unknown = [[self.trtp.UnknownShapeExpr(size) for size in value.shape] for value in inputs]
        plugin.describe(*map(self.trtp.from_shape_expr, unknown, [desc.dtype for desc in seen]))
        described = plugin.describe(*seen)
        described = described if isinstance(described, tuple) else (described,)
        names = {value: name for name, value in types.items()}
        outputs = [np.zeros(desc.shape_expr, names[desc.dtype]) for desc in described]
        (combination,) = plugin.tune(*seen, described)
        assert combination.io_types == ", ".join(TENSORRT[value.dtype.name] for value in (*inputs, *outputs))
        tactic = self.choose(list(combination.tactics) or [0])
        name, kernel, launch, numbers = plugin.launch(*seen, described, tactic)
        assert isinstance(kernel, Kernel)
        assert (name, launch.block_x) == (kernel.name, kernel.threads)
        self.launched.append(name)
        arguments = [*inputs, *(int(number.value) for number in numbers), *outputs]
        run_kernel(kernel, (launch.grid_x, launch.grid_y), arguments)
        return outputs


def write(path: Path, all_weights: list[LayerWeights]) -> None:
    """The layers' sum over one input, each layer after what the one before gave was used."""
    with GraphBuilder(path, TensorProto.FLOAT16) as builder:
        result = linear(builder, "x", all_weights[0])
        for weights in all_weights[1:]:
            result = builder.add(builder.mul(result, builder.scalar(1.0)), linear(builder, "x", weights))
        builder.rename(result, "y")
        infos = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, "tokens", size])
            for name, size in (("x", INPUTS), ("y", OUTPUTS))
        ]
        builder.save(infos[:1], infos[1:])


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the kernels on the CPU")
@pytest.mark.parametrize("choose", [min, max], ids=["few", "many"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_layer_computes_the_planned_numbers(
    fmt: Format, choose: Callable[[list[int]], int], registry: Any, tmp_path: Path
) -> None:
    weights = layer_weights("stack.layer", fmt, seed=5)
    write(tmp_path / "layer.onnx", [weights])
    x = torch.randn(1, 9, INPUTS, generator=torch.Generator().manual_seed(6)).half()
    machine = Machine(registry, choose)
    y = machine.run(tmp_path / "layer.onnx", x.numpy())
    seen = quantize_activation(x.float(), 8) if fmt.activation_bits == 8 else x
    assert weights.quantized is not None and weights.bias is not None
    expected = (seen.double() @ weights.quantized.dequantize().double().T).numpy() + weights.bias
    # The kernel's sum is rounded to float16, and again with the bias; the sum itself is one of slices in float32. Tiny
    # numbers lie no closer than 2^-24.
    weight = weights.quantized.dequantize().numpy()
    size = rounding.magnitude(seen.float().numpy(), weight)
    allowed = rounding.HALF * (np.abs(expected - weights.bias) + np.abs(expected))
    assert (np.abs(y - expected) <= allowed + 2.0**-20 * size + 2.0**-24).all()
    assert {"few", "many"} & set(machine.launched[-1].split("_")) == {"few" if choose is min else "many"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the kernels on the CPU")
@pytest.mark.parametrize("name", ["w2a16_g64", "w4a16", "w4a8_g32"])
def test_layers_of_one_input_and_format_are_one_launch(name: str, registry: Any, tmp_path: Path) -> None:
    """Four layers: three in one launch, the fourth in another; their sum is that of float64."""
    fmt = Format.parse(name)
    layers = [layer_weights(f"stack.{part}", fmt, seed) for seed, part in enumerate("qkvr")]
    write(tmp_path / "group.onnx", layers)
    nodes = [node.op_type for node in onnx.load(str(tmp_path / "group.onnx")).graph.node if node.domain]
    bare = name.split("_")[0]
    assert nodes == ["quantize_rows"] * (fmt.activation_bits == 8) + [f"{bare}_x3", bare]
    machine = Machine(registry, min)
    x = torch.randn(1, 9, INPUTS, generator=torch.Generator().manual_seed(6)).half()
    y = machine.run(tmp_path / "group.onnx", x.numpy())
    assert [launched.split("_")[0] for launched in machine.launched if launched != "quantize_rows"] == [bare, bare]
    seen = (quantize_activation(x.float(), 8) if fmt.activation_bits == 8 else x).double()
    expected = np.zeros((1, 9, OUTPUTS))
    largest = np.zeros_like(expected)
    for weights in layers:
        assert weights.quantized is not None and weights.bias is not None
        expected += (seen @ weights.quantized.dequantize().double().T).numpy() + weights.bias
        largest = np.maximum(largest, np.abs(expected))
    # Each layer is rounded, again with its bias, and the sum after it: three roundings of at most what is reached.
    assert (np.abs(y - expected) <= 4 * 3 * rounding.HALF * (largest + 4)).all()


def test_layers_of_other_formats_stay_apart(tmp_path: Path) -> None:
    layers = [layer_weights(f"stack.{name}", Format.parse(name), 7) for name in ("w4a8_g32", "w4a8_g64", "w2a16_g32")]
    write(tmp_path / "apart.onnx", layers)
    nodes = [node.op_type for node in onnx.load(str(tmp_path / "apart.onnx")).graph.node if node.domain]
    assert nodes == ["quantize_rows", "w4a8", "w4a8", "w2a16"]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_bytes_are_counted_with_their_filling(fmt: Format, tmp_path: Path) -> None:
    write(tmp_path / "layer.onnx", [layer_weights("stack.layer", fmt, seed=5)])
    tensors = {tensor.name: tensor for tensor in onnx.load(str(tmp_path / "layer.onnx")).graph.initializer}
    stored = len(tensors["stack.layer.codes"].raw_data)
    unit = UnitRecord("stack.layer", "linear", "layer", OUTPUTS, INPUTS, str(fmt), str(fmt), "", stored, 0, None, None)
    bare, filled = planned_bytes(unit, find_backend("tensorrt"))
    assert bare == OUTPUTS * INPUTS * fmt.weight_bits // 8
    assert stored == filled == 48 * 256 * fmt.weight_bits // 8
