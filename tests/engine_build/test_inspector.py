"""TensorRT's engine inspector: what its JSON, of versions 10 and 11, tells of each layer; builds ask it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from choices import rtn
from ragged import write_plan

from engine_build.backends.tensorrt import inspector
from engine_build.build import Request, build
from engine_build.verify import verify
from engine_build.weights import layers_of
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import Format
from vla_policy.core.policy_config import PolicyConfig
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


def test_a_plugin_is_told_by_its_kind() -> None:
    plugin = {"Name": "fused", "LayerType": "PluginV3", "Metadata": "[ONNX Layer: mlp.up]"}
    found = told(TEN, plugin)
    assert inspector.became_plugin(found, "mlp.up")
    assert not inspector.became_plugin(found, "q_proj") and not inspector.became_plugin(found, "mlp")


@pytest.fixture
def builder_that(device: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A stand-in for a builder that does otherwise, in the processes that a build starts."""

    def change(*changes: tuple[str, str]) -> None:
        real = Path(__file__).parents[1] / "fake_tensorrt" / "tensorrt" / "__init__.py"
        folder, text = tmp_path / "path" / "tensorrt", real.read_text()
        folder.mkdir(parents=True)
        for before, after in changes:
            assert before in text
            text = text.replace(before, after)
        (folder / "__init__.py").write_text(text)
        (folder / "plugin.py").write_text((real.parent / "plugin.py").read_text())
        monkeypatch.syspath_prepend(str(tmp_path / "path"))
        sys.modules.pop("tensorrt", None)

    return change


def test_what_the_inspector_proves_is_realised(workshop: Path, tmp_path: Path, device: None) -> None:
    request = Request(workshop / "policy", find_target("orin-jp6"), tmp_path / "e", uniform=rtn(Format(4, 16, 64)))
    manifest = build(request)
    assert {unit.realised for unit in manifest.units} <= {"w4a16_g64", "w4a16"}
    assert {unit.arithmetic for unit in manifest.units} == {
        "INT4 codes by TensorRT's inspector (INT4); float16 activations"
    }


def test_codes_that_the_builder_has_folded_are_noticed(
    workshop: Path, tmp_path: Path, builder_that: Callable[..., None]
) -> None:
    builder_that(('else "Int8"', 'else "Half"'))
    request = Request(workshop / "policy", find_target("orin-jp6"), tmp_path / "e", uniform=rtn(Format(8, 16)))
    with pytest.raises(ArtefactError, match=r"was planned as w8a16 but runs as w16a16 \(.*inspector \(no integers\)\)"):
        build(request)


BYTES = ('.with_suffix(".data").read_bytes()', '.with_suffix(".data").read_bytes()[::-1]')
"""An engine in which nothing stands as it was given."""


def with_plugins(workshop: Path, out: Path) -> Request:
    layers = layers_of(PolicyConfig.load(workshop / "policy"))
    kinds = {"linear": Format(2, 16, 32), "head": Format(4, 8, 64)}
    plan = {name: rtn(kinds.get(layer.kind, Format(8, 16))) for name, layer in layers.items()}
    path = write_plan(out.parent / "plan.json", sha256_policy(workshop / "policy"), plan)
    return Request(workshop / "policy", find_target("orin-jp7"), out, plan=path)


def test_no_format_needs_its_bytes_to_stand_in_the_engine(
    workshop: Path, tmp_path: Path, builder_that: Callable[..., None]
) -> None:
    builder_that(BYTES)
    manifest = build(with_plugins(workshop, tmp_path / "e"))
    assert {unit.realised for unit in manifest.units} >= {"w2a16_g32", "w8a16", "w4a8"}
    assert not any("found" in unit.arithmetic for unit in manifest.units)
    assert verify(tmp_path / "e", workshop / "policy", None).reference is None


def test_a_plugin_that_is_neither_told_nor_found_is_refused(
    workshop: Path, tmp_path: Path, builder_that: Callable[..., None]
) -> None:
    builder_that(BYTES, ('"LayerType": "PluginV3"', '"LayerType": "gemm"'))
    with pytest.raises(ArtefactError, match=r"codes of \d+ layers are not in the engine, e\.g\. language_model"):
        build(with_plugins(workshop, tmp_path / "e"))
