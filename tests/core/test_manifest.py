"""The manifest: complete for a reader, the same after a round trip, and its sums."""

import json
from pathlib import Path

import pytest
from ragged import config_dict

from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Recipe
from vla_policy.core.manifest import FileRecord, Manifest, UnitRecord, file_records
from vla_policy.core.program import Call, GraphSpec, Range, TensorSpec

RTN, MSE = Recipe("rtn", 1), Recipe("mse", 3, (("steps", 40),))


def manifest() -> Manifest:
    graph = GraphSpec("vision.onnx", (TensorSpec("pixel_values", "float32", (1, 6, "height", 16), "pixels"),), ())
    units = (
        UnitRecord("a", "linear", "vision", 8, 64, "w4a16_g32", "w4a16_g32", "MatMulNBits", 256, 32, 320, RTN),
        UnitRecord("b", "linear", "vision", 8, 64, "w8a16", "w8a16", "MatMul", 512, 16, None, MSE),
    )
    return Manifest(
        target="cpu",
        backend="onnxruntime",
        backend_version="1.31.1",
        builder_version="0.1.0",
        graphs={"vision": graph},
        program={"vision": Call("vision", {"height": Range(1, 8, 16)}, {})},
        units=units,
        files={"vision.onnx": FileRecord("0" * 64, 1000)},
        parents={"policy": "1" * 64, "plan": "2" * 64},
        policy_config=config_dict(),
        other_bytes=184,
        legalized=("a: w4a4_g32 -> w4a16_g32 (no kernel)",),
    )


def test_round_trip(tmp_path: Path) -> None:
    manifest().write(tmp_path)
    assert Manifest.load(tmp_path) == manifest()


def test_sums_count_codes_scales_and_the_rest() -> None:
    assert manifest().totals() == {
        "units": 2,
        "weights": 1024,
        "code_bytes": 768,
        "scale_bytes": 48,
        "other_bytes": 184,
        "engine_bytes": 1000,
        "average_bits": 6.0,
    }


def test_a_reader_needs_nothing_else(tmp_path: Path) -> None:
    """Preprocessing, action layout and statistics are spelled out, though they follow from the configuration."""
    manifest().write(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content["preprocessing"]["towers"][0]["kind"] == "dinov2"
    assert content["preprocessing"]["resize"].startswith("antialiased bicubic to 16 x 16 pixels")
    layout = content["actions"]["ragged"]
    assert (layout["dimensions"], layout["first_token"], layout["last_token"]) == (3, 44, 299)
    assert (layout["normalization"], layout["action"]["high"]) == ("bounds_q99", [1.0, 2.0, 1.0])
    assert layout["proprio"]["names"] == ["x", "y", "z"]


def test_records_leave_out_the_manifest_itself(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"abc")
    (tmp_path / "manifest.json").write_text("{}")
    assert {name: record.bytes for name, record in file_records(tmp_path).items()} == {"data": 3}


@pytest.mark.parametrize("missing", ["units", "files", "policy_config"])
def test_a_missing_field_is_named(missing: str, tmp_path: Path) -> None:
    content = manifest().to_json()
    del content[missing]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match=f"field '{missing}' is missing or malformed"):
        Manifest.load(tmp_path)
