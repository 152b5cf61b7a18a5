"""Reading artefacts, hashed and typed; writing those that are JSON."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vla_policy.core.errors import ArtefactError
from vla_policy.core.outputs import FolderKind, atomic_path, begin_folder

STATISTICS = "dataset_statistics.json"
"""What OpenVLA's fine-tuning writes beside `config.json`: the statistics that count."""

_CHUNK_BYTES = 1 << 22


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a file's bytes. Raises ArtefactError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return digest.hexdigest()


def named_file(folder: Path | str, name: Any) -> Path:
    """The file of `folder` that an artefact there calls `name`. Raises ArtefactError unless that is a plain name.

    What an artefact names lies beside it; a path could lead anywhere.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ArtefactError(f"{folder}: an artefact names the file {name!r}; expected a plain name in this folder")
    return Path(folder) / name


def confined_file(folder: Path | str, name: Any) -> Path:
    """`named_file`, which must also be no link to somewhere else."""
    path = named_file(folder, name)
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
        raise ArtefactError(f"{path}: links to {os.path.realpath(path)}, outside its folder; copy the file itself")
    return path


def sha256_folder(folder: Path | str, patterns: Iterable[str] = ("*",)) -> str:
    """Hex sha256 over the names and contents of the folder's files that match, in sorted order."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtefactError(f"{folder}: no such folder; check the path")
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise ArtefactError(f"{folder}: holds no {' or '.join(patterns)}; check that it is the right folder")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def sha256_policy(folder: Path | str) -> str:
    """Hex sha256 that identifies a policy in plans and engines: its configuration, tokenizer, noise and weights."""
    return sha256_folder(folder, ("config.json", STATISTICS, "tokenizer.json", "noise.npy", "*.safetensors"))


def write_json(path: Path | str, content: dict[str, Any]) -> None:
    """Writes `content` atomically, keys sorted, NaN refused (a report must not hide one).

    Raises ArtefactError where something stands that is not of the same `kind`; see `core.outputs`.
    """
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_path(path, content["kind"]) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path | str, kind: str | None = None, schema_version: int = 1) -> dict[str, Any]:
    """The artefact at `path`. With `kind`, its `kind` and `schema_version` must be these, else ArtefactError."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(
            f"{path}: not valid JSON ({error}); the file is truncated or damaged: make it again"
        ) from error
    if not isinstance(content, dict):
        raise ArtefactError(f"{path}: expected a JSON object, got {type(content).__name__}")
    if kind is not None:
        got = (content.get("kind"), content.get("schema_version"))
        if got != (kind, schema_version):
            remedy = "made by another version: make it again" if got[0] == kind else "name the right file"
            raise ArtefactError(
                f"{path}: expected kind {kind!r} version {schema_version}, got kind {got[0]!r} version {got[1]!r}; "
                f"{remedy}"
            )
    return content


def claim_folder(
    path: Path | str, kind: FolderKind, content: dict[str, Any] | None = None, inputs: Iterable[Path | None] = ()
) -> dict[str, Any]:
    """For folders that are filled bit by bit: `path` is one of `kind` from here on; returns what its index holds.

    content: for the index, where there is none yet. inputs: see `outputs.check_file`. Raises ArtefactError for a folder
    that holds anything else.
    """
    index = Path(path) / kind.index
    if begin_folder(path, kind, inputs):
        write_json(index, {"schema_version": 1, "kind": kind.name} | (content or {}))
    return read_json(index, kind.name)
