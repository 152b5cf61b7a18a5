"""What the demo says about packed bytes, on an engine whose groups are ragged."""

import json
import shutil
from pathlib import Path

import pytest
from ragged import build_engine

from demo.pipeline import packed_against_plan
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `engine` and a `plan.json` that counts its weights."""
    folder = tmp_path_factory.mktemp("ragged")
    build_engine(folder, ["w2a16_g32", "w8a16_g32"])
    units = Manifest.load(folder / "engine").units
    bits = sum(unit.outputs * unit.inputs * Format.parse(unit.planned).weight_bits for unit in units)
    plan = json.loads((folder / "plan.json").read_text())
    counted = {"weight_bits": bits, "average_bits": bits / sum(unit.weights for unit in units)}
    (folder / "plan.json").write_text(json.dumps(plan | counted))
    return folder


def test_filled_groups_are_named_and_accepted(ragged: Path) -> None:
    units = Manifest.load(ragged / "engine").units
    bare = sum(-(-unit.weights * Format.parse(unit.planned).weight_bits // 8) for unit in units)
    filled = sum(unit.outputs * (-unit.inputs % 32) * Format.parse(unit.planned).weight_bits // 8 for unit in units)
    assert filled > 0
    text = packed_against_plan(ragged / "engine", ragged / "plan.json")
    assert text.startswith(f"packed: {bare:,} bytes of codes, as planned")
    assert f", {filled:,} more fill up groups; scales add" in text


def test_other_weights_than_planned_are_refused(ragged: Path, tmp_path: Path) -> None:
    plan = json.loads((ragged / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"weight_bits": plan["weight_bits"] + 8}))
    with pytest.raises(ArtefactError, match="build the engine again"):
        packed_against_plan(ragged / "engine", tmp_path / "plan.json")


def test_codes_that_take_more_than_their_format_are_refused(ragged: Path, tmp_path: Path) -> None:
    shutil.copytree(ragged / "engine", tmp_path / "engine")
    manifest = json.loads((tmp_path / "engine" / "manifest.json").read_text())
    manifest["units"][0]["code_bytes"] *= 4
    (tmp_path / "engine" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match=r"takes \d+ bytes, planned w2a16_g32 takes"):
        packed_against_plan(tmp_path / "engine", ragged / "plan.json")
