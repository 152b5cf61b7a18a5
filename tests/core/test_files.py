"""Artefact files: hashed by content, read strictly."""

from pathlib import Path

import pytest

from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import read_json, sha256_folder, write_json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "plan"', "not valid JSON .* truncated or damaged"),
        ("[]", "expected a JSON object"),
        ('{"kind": "plan", "schema_version": 2}', "expected kind 'plan' version 1, got kind 'plan' version 2"),
        ('{"kind": "sensitivity", "schema_version": 1}', "got kind 'sensitivity'"),
    ],
)
def test_an_artefact_that_is_not_what_it_should_be_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(ArtefactError, match=message):
        read_json(path, kind="plan")


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"kind": "x", "omega": float("nan")})
    assert not list(tmp_path.iterdir())


def test_folder_hash_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = sha256_folder(tmp_path)
    (tmp_path / "a").write_text("2")
    second = sha256_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, sha256_folder(tmp_path)}) == 3
    with pytest.raises(ArtefactError, match=r"holds no \*\.onnx"):
        sha256_folder(tmp_path, ["*.onnx"])
