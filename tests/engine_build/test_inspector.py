"""TensorRT's engine inspector: what its JSON, of versions 10 and 11, tells of each layer; builds ask it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from choices import rtn

from engine_build.backends.tensorrt import inspector
from engine_build.build import Request, build
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.targets import find_target

ENGINE = Path("decoder.engine")
TEN = {
    "Name": "q_proj+k_proj",
    "LayerType": "gemm",
    "Inputs": [
        {"Name": "x", "Dimensions": [1, 30, 64], "Format/Datatype": "Row major linear FP16 format"},
        {"Name": "codes", "Dimensions": [64, 128], "Format/Datatype": "Int4"},
    ],
    "Outputs": [{"Name": "y", "Dimensions": [1, 30, 128], "Format/Datatype": "Int8"}],
    "Metadata": "[ONNX Layer: q_proj.dequantized]\u001e[ONNX Layer: q_proj]\u001e[ONNX Layer: k_proj]",
}
ELEVEN = {
    "Name": "o_proj",
    "Inputs": [{"Name": "x", "DataType": "Half"}],
    "Weights": {"Type": "Int8", "Count": 4096},
    "Metadata": "[ONNX Layer: o_proj]",
}


def told(*layers: dict[str, Any]) -> list[inspector.EngineLayer]:
    return inspector.parse(json.dumps({"Layers": list(layers)}), ENGINE)


def test_integers_that_a_layer_reads_are_told_under_the_names_of_its_nodes() -> None:
    found = told(TEN, ELEVEN, {"Name": "norm", "Metadata": "[ONNX Layer: norm]"})
    assert [layer.bits for layer in found] == [{4}, {8}, set()]
    assert inspector.bits_of(found, frozenset({"k_proj"})) == {4}
    assert inspector.bits_of(found, frozenset({"q_proj", "o_proj"})) == {4, 8}
    assert inspector.bits_of(found, frozenset({"norm"})) == set()
    assert inspector.bits_of(found, frozenset({"k_pro"})) is None


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}", '{"Layers": ["only names"]}', '{"Layers": [{}]}'])
def test_an_engine_that_tells_no_details_is_one_line(text: str) -> None:
    with pytest.raises(ArtefactError, match=r"decoder\.engine: TensorRT's inspector tells no details of its layers"):
        inspector.parse(text, ENGINE)


@pytest.fixture
def folding(device: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for a builder that folds 8-bit codes into float16 weights, in the processes that a build starts."""
    real = Path(__file__).parents[1] / "fake_tensorrt" / "tensorrt" / "__init__.py"
    folder = tmp_path / "path" / "tensorrt"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(real.read_text().replace('else "Int8"', 'else "Half"'))
    (folder / "plugin.py").write_text((real.parent / "plugin.py").read_text())
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    sys.modules.pop("tensorrt", None)


def test_what_the_inspector_proves_is_realised(workshop: Path, tmp_path: Path, device: None) -> None:
    request = Request(workshop / "policy", find_target("orin-jp6"), tmp_path / "e", uniform=rtn(Format(4, 16, 64)))
    manifest = build(request)
    assert {unit.realised for unit in manifest.units} <= {"w4a16_g64", "w4a16"}
    assert {unit.arithmetic for unit in manifest.units} == {
        "INT4 codes by TensorRT's inspector (INT4); float16 activations"
    }


def test_codes_that_the_builder_has_folded_are_noticed(workshop: Path, tmp_path: Path, folding: None) -> None:
    request = Request(workshop / "policy", find_target("orin-jp6"), tmp_path / "e", uniform=rtn(Format(8, 16)))
    with pytest.raises(ArtefactError, match=r"was planned as w8a16 but runs as w16a16 \(.*inspector \(no integers\)\)"):
        build(request)
