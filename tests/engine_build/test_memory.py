"""Dequantized weights must not pile up: one layer's at a time, whatever else the graph holds."""

import subprocess
import sys
from pathlib import Path

import torch
from choices import rtn
from onnx import TensorProto, helper

from calibrator.quantizers import quantize
from engine_build.backends.onnxruntime.linear import linear
from engine_build.graph.builder import GraphBuilder
from engine_build.weights import Layer, LayerWeights
from vla_policy.core.formats import Format

LAYERS, WIDTH = 24, 768
FLOAT_BYTES = LAYERS // 2 * WIDTH * WIDTH * 4

# Runs in a process of its own, whose peak memory is its own; prints by how many bytes one run raises it.
MEASURE = """
import sys
from pathlib import Path
import numpy as np
from vla_policy.core.backends.onnxruntime.session import open_session, session_options

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

session = open_session(Path(sys.argv[1]), session_options(1))
before = peak()
session.run(None, {"x": np.zeros((1, 1, int(sys.argv[2])), np.float32)})
print(peak() - before)
"""


def test_a_run_holds_the_floats_of_few_layers_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "chain.onnx"
    with GraphBuilder(path) as builder:
        x = "x"
        for index in range(LAYERS):
            fmt = Format(8, 16) if index % 2 else Format(4, 16, 128)  # fused nodes between are what reorders a graph
            layer = Layer(f"layer.{index}", "linear", f"layer.{index}", WIDTH, WIDTH, bias=False)
            weights = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(index))
            packed = LayerWeights(layer, fmt, quantize(weights, rtn(fmt)), None, None)
            x = builder.node("Gelu", [linear(builder, x, packed)])
        builder.rename(x, "y")
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", WIDTH]) for name in "xy"]
        builder.save(infos[:1], infos[1:])
    command = [sys.executable, "-c", MEASURE, str(path), str(WIDTH)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < FLOAT_BYTES / 2
