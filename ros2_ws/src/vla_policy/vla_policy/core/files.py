"""Reading and writing artefacts: hashed, typed, and never half-written."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vla_policy.core.errors import ArtefactError

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
    """Hex sha256 that identifies a policy in plans and engines: its configuration, tokenizer and weights."""
    return sha256_folder(folder, ("config.json", STATISTICS, "tokenizer.json", "*.safetensors"))


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary file name beside `path`; renames it to `path` on success, removes it on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ArtefactError(
            f"{path}: cannot be written ({error.strerror}); check free space and permissions"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; replaces `path` by it on success, removes it on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    replaced = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        if path.exists():
            os.replace(path, replaced)
        os.replace(temporary, path)
    except OSError as error:
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        raise ArtefactError(
            f"{path}: cannot be written ({error.strerror}); check free space and permissions"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def write_json(path: Path | str, content: dict[str, Any]) -> None:
    """Writes `content` atomically, keys sorted, NaN refused (a report must not hide one)."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_path(path) as temporary:
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
            raise ArtefactError(
                f"{path}: expected kind {kind!r} version {schema_version}, got kind {got[0]!r} version {got[1]!r}"
            )
    return content
