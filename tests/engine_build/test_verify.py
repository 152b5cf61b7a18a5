"""Verification: what it records, and that it notices other weights, other policies and other bytes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ragged import write_policy
from rounding import NETWORK

from engine_build.__main__ import main
from engine_build.backends import find_backend
from engine_build.build import planned_bytes
from engine_build.verify import verify
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file
from vla_policy.core.manifest import Manifest, UnitRecord


@pytest.fixture
def copied(workshop: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workshop / "engine", tmp_path / "engine"))


def test_outcome_is_recorded_and_printed(workshop: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copied), "--policy", str(workshop / "policy"), "--samples", "3"]) == 0
    assert "3 states; torch with the same formats" in capsys.readouterr().out
    check = Manifest.load(copied).reference_check
    assert check is not None
    assert check["same_formats_in_torch"]["scores_error"] < NETWORK
    assert check["same_formats_in_torch"]["equal_tokens"] == 1.0
    assert check["full_precision_torch"]["scores_error"] > 0.01
    assert check["source"] == "random images, seed 0"


def test_another_policy_is_refused(copied: Path, tmp_path: Path) -> None:
    other = write_policy(tmp_path / "other", seed=1)
    with pytest.raises(ArtefactError, match=r"built from the policy .* name the engine's own policy"):
        verify(copied, other, None, 1)


def test_other_weights_are_noticed_though_every_hash_fits(workshop: Path, copied: Path) -> None:
    """A packing defect would look like this: formats and sizes right, numbers wrong."""
    data = copied / "decoder.data"
    content = np.frombuffer(data.read_bytes(), np.uint8).copy()
    content[len(content) // 2 :] ^= 0x11
    data.write_bytes(content.tobytes())
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"]["decoder.data"]["sha256"] = sha256_file(data)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    before = (copied / "manifest.json").read_bytes()
    with pytest.raises(ArtefactError, match="logits differ from the torch policy with the same formats"):
        verify(copied, workshop / "policy", None, 2)
    assert (copied / "manifest.json").read_bytes() == before


def test_a_manifest_that_claims_another_format_is_noticed(workshop: Path, copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["units"][0]["realised"] = manifest["units"][0]["planned"] = "w4a16_g32"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match=r"patch_embed.proj is .*'w2a16_g32'.* the manifest says .*'w4a16_g32'"):
        verify(copied, workshop / "policy", None, 1)


@pytest.mark.parametrize(
    ("planned", "inputs", "backend", "bytes_"),
    [
        ("w4a16_g32", 64, "onnxruntime", (320, 320)),
        ("w2a16_g32", 48, "onnxruntime", (120, 160)),
        ("w8a8", 50, "onnxruntime", (500, 500)),
        ("w16a16", 3, "tensorrt", (60, 60)),
        ("w2a16", 49, "tensorrt_rtx", (123, 125)),
        # Kernels of our own take 16 outputs and 128 inputs at a time.
        ("w2a16_g32", 48, "tensorrt", (120, 16 * 128 // 4)),
        ("w4a16_g32", 48, "tensorrt", (240, 320)),
        ("w4a8", 130, "tensorrt", (650, 16 * 256 // 2)),
    ],
)
def test_planned_bytes_count_codes_and_at_most_one_filling(
    planned: str, inputs: int, backend: str, bytes_: tuple[int, int]
) -> None:
    unit = UnitRecord("unit", "linear", "decoder", 10, inputs, planned, planned, "", 0, 0, None, None)
    assert planned_bytes(unit, find_backend(backend)) == bytes_
