"""Which operator set a graph is written in: robots with an older runtime read no later one."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engine_build.graph.builder import GraphBuilder


@pytest.mark.parametrize(
    ("data_type", "opset", "ir"), [(TensorProto.INT4, 21, 10), (TensorProto.INT8, 21, 10), (TensorProto.INT2, 25, 13)]
)
def test_a_graph_takes_the_lowest_operator_set_that_its_tensors_need(
    data_type: int, opset: int, ir: int, tmp_path: Path
) -> None:
    with GraphBuilder(tmp_path / "graph.onnx") as builder:
        codes = builder.raw(
            "codes", data_type, (4,), bytes({TensorProto.INT8: 4, TensorProto.INT4: 2}.get(data_type, 1))
        )
        scale = builder.tensor("scale", np.float32(0.5))
        builder.rename(builder.node("DequantizeLinear", [codes, scale]), "y")
        builder.save([], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])])
    model = onnx.load(tmp_path / "graph.onnx")
    assert (model.opset_import[0].version, model.ir_version) == (opset, ir)
