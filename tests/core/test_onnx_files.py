"""Files that an ONNX model names, found without the onnx package, against models that the package writes."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from vla_policy.core.backends.onnxruntime.onnx_files import external_files
from vla_policy.core.errors import ArtefactError


def external(location: str) -> TensorProto:
    tensor = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[300], data_location=TensorProto.EXTERNAL)
    for key, value in (("offset", "0"), ("location", location), ("length", "1200"), ("checksum", "location")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph(name: str, nodes: list[onnx.NodeProto], tensors: list[TensorProto]) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [], tensors)


def test_every_place_of_a_tensor_is_looked_into(tmp_path: Path) -> None:
    """Initialisers, attributes, sparse tensors, branches within branches, functions and training graphs."""
    inner = graph("inner", [helper.make_node("Constant", [], ["c"], value=external("in_branch_attribute"))], [])
    branch = graph("branch", [helper.make_node("If", ["x"], ["z"], then_branch=inner)], [external("in_branch")])
    nodes = [
        helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=graph("other", [], [external("in_else")])),
        helper.make_node("Op", [], ["l"], values=[external("in_list"), external("in_list_again")]),
        helper.make_node("Op", [], ["g"], bodies=[graph("body", [], [external("in_body")])]),
    ]
    main = graph("main", nodes, [external("decoder.data"), external("../evil.data"), external("/etc/passwd")])
    sparse = onnx.SparseTensorProto(values=external("in_sparse"), indices=external("in_indices"), dims=[9])
    main.sparse_initializer.append(sparse)
    inside = helper.make_node("Constant", [], ["s"], sparse_value=onnx.SparseTensorProto(values=external("in_node")))
    main.node.append(inside)
    model = helper.make_model(main)
    constant = helper.make_node("Constant", [], ["k"], value=external("in_function"))
    model.functions.append(helper.make_function("d", "f", [], ["k"], [constant], [helper.make_opsetid("", 20)]))
    model.functions[0].attribute_proto.append(helper.make_attribute("a", external("in_default")))
    model.training_info.add(initialization=graph("begin", [], [external("in_training")]), algorithm=inner)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    places = ("branch", "branch_attribute", "else", "list", "list_again", "body", "sparse", "indices", "node")
    named = {f"in_{place}" for place in (*places, "function", "default", "training")}
    assert external_files(path) == {"decoder.data", "../evil.data", "/etc/passwd", *named}


def test_a_model_without_external_data_names_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    node = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("t", TensorProto.FLOAT, [2], [0.5, 1]))
    path.write_bytes(helper.make_model(graph("main", [node], [])).SerializeToString())
    assert external_files(path) == set()


@pytest.mark.parametrize("content", [b"\xff" * 20, b"\x3a\x7f", b"\x0f", b"ORTM" * 9, b"\x3a"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"model.onnx: not an ONNX model"):
        external_files(path)
