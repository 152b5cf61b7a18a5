"""A stand-in for TensorRT 10's builder: an "engine" is the weights of the graph and a record of what was asked for.

Put this folder first on `sys.path`. Names and signatures are checked against TensorRT's own stubs by the tests.
"""

import ctypes
import json
import os
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import onnx

from tensorrt import plugin

__version__ = os.environ.get("FAKE_TENSORRT", "11.4.1")
MARK = b"\nRECORD "


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    BF16 = 7


float32, float16, int32, bfloat16 = DataType.FLOAT, DataType.HALF, DataType.INT32, DataType.BF16


class NetworkDefinitionCreationFlag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class ProfilingVerbosity(IntEnum):
    DETAILED = 2


class LayerInformationFormat(IntEnum):
    JSON = 1


class ILogger:
    ERROR = 1

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+"


class IOptimizationProfile:
    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        assert len(min) == len(opt) == len(max)


class IBuilderConfig:
    profiling_verbosity: ProfilingVerbosity

    def __init__(self) -> None:
        self.record: dict[str, Any] = {"profiles": 0}

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.record["profiles"] += 1
        return self.record["profiles"] - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        self.record["cache"] = serialized_timing_cache.decode()
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        return not ignore_mismatch


class ITensor:
    is_shape_tensor = False

    def __init__(self, name: str) -> None:
        self.name = name


class ILayer:
    def __init__(self, node: onnx.NodeProto) -> None:
        self.node = node

    @property
    def num_outputs(self) -> int:
        return len(self.node.output)

    def get_output(self, index: int) -> ITensor:
        return ITensor(self.node.output[index])


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.path = Path()
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[ITensor] = []
        self.debug: list[str] = []

    @property
    def num_layers(self) -> int:
        return len(self.nodes)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> ITensor:
        return self.inputs[index]

    def get_layer(self, index: int) -> "ILayer":
        return ILayer(self.nodes[index])

    def mark_debug(self, tensor: ITensor) -> bool:
        self.debug.append(tensor.name)
        return True


class OnnxParser:
    num_errors = 0

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self.network = network

    def parse_from_file(self, model: str) -> bool:
        graph = onnx.load(model, load_external_data=False).graph
        self.network.path, self.network.nodes = Path(model), list(graph.node)
        self.network.inputs = [ITensor(value.name) for value in graph.input]
        return True


class IPluginRegistry:
    """Really loads a library, and counts what it offers."""

    creators = 0

    def load_library(self, plugin_path: str) -> object | None:
        count = ctypes.c_int32()
        offered = ctypes.CDLL(plugin_path).getCreators
        offered.restype = ctypes.c_void_p
        if not offered(ctypes.byref(count)):
            return None
        self.creators += count.value
        return offered


_REGISTRY = IPluginRegistry()


def get_plugin_registry() -> IPluginRegistry:
    return _REGISTRY


class Builder:
    def __init__(self, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes:
        graph = onnx.load(str(network.path), load_external_data=False).graph
        nodes = graph.node
        wanted = sorted({node.op_type for node in nodes if node.domain})
        missing = [name for name in wanted if f"vla_policy::{name}" not in plugin.REGISTRY]
        missing = [] if _REGISTRY.creators else missing
        assert not missing, f"the graph names plugins that are not registered: {missing}"
        record = config.record | {"flags": network.flags, "plugins": wanted, "debug": network.debug}
        record["layers"] = describe(graph)
        if _REGISTRY.creators:
            record["creators"] = _REGISTRY.creators
        return network.path.with_suffix(".data").read_bytes() + MARK + json.dumps(record).encode()


def describe(graph: onnx.GraphProto) -> list[dict[str, Any]]:
    """A product per layer, with what was joined to it, as the inspector of TensorRT 10 tells it."""
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    layers = []
    for node in graph.node:
        if node.domain:
            read = [{"Name": name, "Format/Datatype": "Int32"} for name in node.input]
            said = f"[ONNX Layer: {node.name}]"
            layers.append({"Name": node.name, "LayerType": "PluginV3", "Inputs": read, "Metadata": said})
        if node.op_type != "MatMul":
            continue
        joined, read = [node.name], [("x", "Half")]
        for name in node.input:
            maker = makers.get(name)
            if maker is not None and maker.op_type == "DequantizeLinear":
                joined.append(maker.name)
                read.append((maker.input[0], "Int4" if types.get(maker.input[0]) == onnx.TensorProto.INT4 else "Int8"))
        layers.append(
            {
                "Name": f"gemm_{len(layers)}",
                "LayerType": "gemm",
                "Inputs": [{"Name": name, "Dimensions": [], "Format/Datatype": kind} for name, kind in read],
                "Outputs": [{"Name": node.output[0], "Dimensions": [], "Format/Datatype": "Half"}],
                "Metadata": "\u001e".join(f"[ONNX Layer: {name}]" for name in joined),
            }
        )
    return layers


class EngineInspector:
    def __init__(self, layers: list[dict[str, Any]]) -> None:
        self.layers = layers

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        assert format == LayerInformationFormat.JSON
        return json.dumps({"Layers": self.layers, "Bindings": []})


class ICudaEngine:
    def __init__(self, layers: list[dict[str, Any]]) -> None:
        self.layers = layers

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self.layers)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        _, mark, record = serialized_engine.rpartition(MARK)
        return ICudaEngine(json.loads(record)["layers"]) if mark else None
