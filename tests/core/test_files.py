"""Artefact files: hashed by content, read strictly."""

from pathlib import Path

import pytest

from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import confined_file, named_file, read_json, sha256_folder, write_json


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


_PATHS = ["../evil", "/etc/passwd", "sub/file", "..", ".", "", "a\0b", "./file", None, 3, ["file"]]


@pytest.mark.parametrize("name", _PATHS)
def test_what_an_artefact_names_is_a_plain_name(tmp_path: Path, name: object) -> None:
    with pytest.raises(ArtefactError, match=r"an artefact names the file .*; expected a plain name in this folder"):
        named_file(tmp_path, name)
    assert named_file(tmp_path, "a file.data") == tmp_path / "a file.data"


def test_a_link_may_not_leave_the_folder(tmp_path: Path) -> None:
    """The folder itself may be reached by a link, and a link within it stays there."""
    folder, outside = tmp_path / "engine", tmp_path / "outside"
    folder.mkdir()
    (folder / "real").write_text("1")
    outside.write_text("2")
    (tmp_path / "link").symlink_to(folder)
    (folder / "inside").symlink_to("real")
    for name in ("real", "inside", "absent"):
        assert confined_file(tmp_path / "link", name) == tmp_path / "link" / name
    (folder / "out").symlink_to(outside)
    (folder / "round").symlink_to(tmp_path / "link" / "out")
    for name in ("out", "round"):
        with pytest.raises(ArtefactError, match=rf"{name}: links to .*outside, outside its folder; copy the file"):
            confined_file(folder, name)
