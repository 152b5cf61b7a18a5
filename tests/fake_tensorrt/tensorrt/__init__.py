"""A stand-in for TensorRT 10's builder: an "engine" is the weights of the graph and a record of what was asked for.

Put this folder first on `sys.path`. Names and signatures are checked against TensorRT's own stubs by the tests.
"""

import json
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import onnx

from tensorrt import plugin

__version__ = "10.13.0"
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


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.path = Path()


class OnnxParser:
    num_errors = 0

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self.network = network

    def parse_from_file(self, model: str) -> bool:
        self.network.path = Path(model)
        return True


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
        nodes = onnx.load(str(network.path), load_external_data=False).graph.node
        wanted = sorted({node.op_type for node in nodes if node.domain})
        missing = [name for name in wanted if f"vla_policy::{name}" not in plugin.REGISTRY]
        assert not missing, f"the graph names plugins that are not registered: {missing}"
        record = config.record | {"flags": network.flags, "plugins": wanted}
        return network.path.with_suffix(".data").read_bytes() + MARK + json.dumps(record).encode()
