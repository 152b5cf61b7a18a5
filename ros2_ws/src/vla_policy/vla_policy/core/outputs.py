"""Where results go: what a result may replace, and how neither it nor what stood there before is lost on the way.

A result replaces only what is absent, empty, or of its own kind by what it says of itself; names prove nothing. Links
are followed: what a link points to is replaced, and the link stays.

Everything is written in a scratch folder beside its place, `.NAME.XXXX.partial`, brought to the disk, and renamed. A
folder in the way is first moved into the scratch folder, so that a process that ends between the two renames leaves
both; the next one that is to write there puts the finished result in its place.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vla_policy.core.errors import ArtefactError

_SUFFIX = ".partial"
_LOCK, _NEW, _REPLACED = "lock", "new", "replaced"
_HEAD_BYTES = 4096
_PAGE_KIND = re.compile(rb"<!-- kind: ([\w-]+) -->")
_BAG_KEY = b"rosbag2_bagfile_information:"
_NAMED = 3


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder: the file `index` says that a folder is one, and only `parts` lie beside that.

    parts: patterns of the other files' paths within the folder. listed: the key of the index that names further files.
    """

    name: str
    index: str
    parts: tuple[str, ...] = ()
    listed: str | None = None

    def strangers(self, folder: Path) -> list[str]:
        """The files in `folder` that are no part of this kind."""
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
        listed = json.loads((folder / self.index).read_bytes())[self.listed] if self.listed and files else ()
        parts = (self.index, *self.parts)
        return [name for name in files if name not in listed and not any(_matches(name, part) for part in parts)]


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and PurePosixPath(name).match(pattern)


def page_kind(kind: str) -> str:
    """The comment by which a page (HTML or Markdown) says what it is."""
    return f"<!-- kind: {kind} -->"


def kind_of(path: Path) -> str | None:
    """The kind that a file says it is of; None where it says nothing or cannot be read.

    That is `kind` in JSON, in the first of JSON lines or in safetensors' metadata, the comment of `page_kind` near the
    top of a page, and `rosbag2` for a bag's metadata.yaml.
    """
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD_BYTES)
            if page := _PAGE_KIND.search(head):
                return page[1].decode()
            if head.startswith(_BAG_KEY):
                return "rosbag2"
            if head.lstrip()[:1] == b"{":
                content = _json(head + stream.read())
            elif head[8:9] == b"{":  # safetensors: the header's length, then the header
                size = min(int.from_bytes(head[:8], "little"), os.fstat(stream.fileno()).st_size)
                content = json.loads((head + stream.read(size))[8 : 8 + size]).get("__metadata__", {})
            else:
                return None
    except (OSError, ValueError, AttributeError):
        return None
    kind = content.get("kind")
    return kind if isinstance(kind, str) else None


def _json(text: bytes) -> dict[str, object]:
    """The object that a JSON text is, or the first of JSON lines."""
    try:
        content: dict[str, object] = json.loads(text.split(b"\n", 1)[0])
    except ValueError:
        content = json.loads(text)
    return content


def check_file(path: Path | str, kind: str | None, inputs: Iterable[Path | None] = ()) -> None:
    """Raises ArtefactError unless a file of `kind` can be written at `path` without loss; commands call it first.

    kind: as `kind_of` tells it; None where the folder is the writer's own (`files.claim_folder`), with all in it.
    inputs: what the command reads; no output lies in, above or in place of one.
    """
    real = _real(path)
    _check_apart(path, real, inputs)
    if real.is_dir():
        raise ArtefactError(f"{path}: is a folder; name a file")
    if real.exists() and not real.is_file():
        raise ArtefactError(f"{path}: is neither a file nor a folder; name another file")
    if kind is not None and real.is_file() and real.stat().st_size > 0 and kind_of(real) != kind:
        raise ArtefactError(
            f"{path}: exists and does not say that it is of kind {kind!r}, so it is not replaced; name another file, "
            "or move it away"
        )
    _check_parent(path, real)


def check_folder(path: Path | str, kind: FolderKind, inputs: Iterable[Path | None] = ()) -> None:
    """Raises ArtefactError unless a folder of `kind` can be written at `path` without loss; see `check_file`.

    Puts right what a process left that ended while it replaced `path`.
    """
    real = _real(path)
    _check_apart(path, real, inputs)
    _recover(real)
    _check_content(path, real, kind)
    if real.is_dir():
        if real == Path.cwd() or real in Path.cwd().parents:
            raise ArtefactError(f"{path}: this command runs in it, so it cannot be replaced; call from elsewhere")
        if real.is_mount():
            raise ArtefactError(f"{path}: a file system is mounted there; name a folder in it")
        strangers = kind.strangers(real)
        if strangers:
            raise ArtefactError(
                f"{path}: would be replaced, and holds {_names(strangers)}, no part of a folder of kind "
                f"{kind.name!r}; move that away, or name another folder"
            )
    _check_parent(path, real)


def begin_folder(path: Path | str, kind: FolderKind, inputs: Iterable[Path | None] = ()) -> bool:
    """Makes the folder `path` unless there is one of `kind` or an empty one; whether its index is still to be written.

    Raises ArtefactError for a folder of anything else; see `files.claim_folder`.
    """
    real = _real(path)
    _check_apart(path, real, inputs)
    _check_content(path, real, kind)
    _check_parent(path, real)
    with _one_line(path):
        real.mkdir(parents=True, exist_ok=True)
    return not (real / kind.index).exists()


def remove_folder(path: Path, kind: FolderKind) -> None:
    """Removes a folder of `kind`, if there is one. Raises ArtefactError for anything else."""
    check_folder(path, kind)
    real = _real(path)
    if real.exists():
        with _one_line(path):
            shutil.rmtree(real)


@contextmanager
def atomic_path(path: Path | str, kind: str | None) -> Iterator[Path]:
    """Yields the name of a file to write; puts it in place of `path` on success, leaves nothing on any failure.

    kind: see `check_file`, which is asked before and after.
    """
    with _replacing(path, lambda: check_file(path, kind)) as temporary:
        yield temporary


@contextmanager
def atomic_folder(path: Path | str, kind: FolderKind) -> Iterator[Path]:
    """Yields a folder to fill; puts it in place of `path` on success, leaves nothing on any failure.

    kind: see `check_folder`, which is asked before and after.
    """
    with _replacing(path, lambda: check_folder(path, kind)) as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def scratch_beside(path: Path | str) -> Iterator[Path]:
    """A folder on the disk of `path`, removed at the end; those that killed processes left for `path` go now.

    Whoever has one holds a lock on it, by which the living are told from the dead.
    """
    real = _real(path)
    with _one_line(path):
        real.parent.mkdir(parents=True, exist_ok=True)
        for left in _left_behind(real):
            _discard(left, real)
        scratch = Path(tempfile.mkdtemp(prefix=f".{real.name}.", suffix=_SUFFIX, dir=real.parent))
        lock = os.open(scratch / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        _locked(lock)
        yield scratch
    finally:
        _discard(scratch, real)
        os.close(lock)


@contextmanager
def _replacing(path: Path | str, check: Callable[[], None]) -> Iterator[Path]:
    """Yields a name of which whatever is written there, file or folder, takes the place of `path`."""
    check()
    real = _real(path)
    with scratch_beside(path) as scratch:
        new = scratch / _NEW / real.name
        with _one_line(path):
            new.parent.mkdir()
            yield new
            _to_disk(new)
        try:
            check()
        except ArtefactError as error:
            kept = Path(tempfile.mkdtemp(prefix=f"{real.name}.", dir=real.parent)) / real.name
            new.rename(kept)
            raise ArtefactError(f"{error}; it came while this ran: the result is {kept}") from error
        with _one_line(path):
            _put(new, real, scratch)


def _put(new: Path, real: Path, scratch: Path) -> None:
    if real.is_dir() and any(real.iterdir()):
        real.rename(scratch / _REPLACED)
        try:
            new.rename(real)
        except OSError:
            (scratch / _REPLACED).rename(real)
            raise
    else:
        new.replace(real)
    _sync(real.parent)


def _recover(real: Path) -> None:
    """Ends the replacement of `real` by a process that was stopped between the two renames."""
    if real.exists():
        return
    for scratch in _left_behind(real):
        if (scratch / _REPLACED).exists() and (scratch / _NEW / real.name).exists():
            (scratch / _NEW / real.name).rename(real)
            _discard(scratch, real)
            return


def _discard(scratch: Path, real: Path) -> None:
    """Removes a scratch folder, unless what stood at `real` is in it and nothing has taken its place."""
    if real.exists() or not (scratch / _REPLACED).exists():
        shutil.rmtree(scratch, ignore_errors=True)


def _left_behind(real: Path) -> Iterator[Path]:
    """Scratch folders of processes that are no more."""
    name = re.compile(rf"\.{re.escape(real.name)}\.\w+{re.escape(_SUFFIX)}")
    for path in sorted(real.parent.iterdir()) if real.parent.is_dir() else []:
        if name.fullmatch(path.name):
            with suppress(OSError):
                lock = os.open(path / _LOCK, os.O_RDWR)
                try:
                    if _locked(lock):
                        yield path
                finally:
                    os.close(lock)


def _locked(descriptor: int) -> bool:
    """Takes the lock, if nobody has it and the file system knows locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _to_disk(path: Path) -> None:
    """Waits until the disk holds a file, or a folder and everything in it."""
    if path.is_dir():
        for folder, _, names in os.walk(path):
            for name in names:
                _sync(Path(folder) / name)
            _sync(Path(folder))
    else:
        _sync(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot do it for folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _one_line(path: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        elsewhere = f" at {error.filename}" if error.filename and _SUFFIX not in str(error.filename) else ""
        raise ArtefactError(
            f"{path}: cannot be written ({error.strerror}{elsewhere}); check free space and permissions"
        ) from error


def _real(path: Path | str) -> Path:
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise ArtefactError(f"{path}: cannot be resolved ({error}); name another place") from error


def _check_apart(path: Path | str, real: Path, inputs: Iterable[Path | None]) -> None:
    for given in inputs:
        if given is None:
            continue
        source = given.resolve()
        if source == real or source in real.parents or real in source.parents:
            where = "is" if source == real else "lies in" if source in real.parents else "holds"
            raise ArtefactError(f"{path}: {where} the input {given}; name another place for the result")


def _check_content(path: Path | str, real: Path, kind: FolderKind) -> None:
    """Raises ArtefactError for anything but nothing, an empty folder, or one whose index names `kind`."""
    if real.exists() and not real.is_dir():
        raise ArtefactError(f"{path}: is no folder; name an absent or empty one")
    if real.is_dir() and kind_of(real / kind.index) != kind.name:
        names = sorted(entry.name for entry in real.iterdir())
        if names:
            raise ArtefactError(
                f"{path}: holds {_names(names)} and no {kind.index} that says it is of kind {kind.name!r}, so it is "
                "left alone; name an absent or empty folder, or move this one away"
            )


def _check_parent(path: Path | str, real: Path) -> None:
    ancestor = next(parent for parent in real.parents if parent.exists())
    if not ancestor.is_dir():
        raise ArtefactError(f"{path}: {ancestor} is no folder; name another place")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise ArtefactError(f"{path}: {ancestor} may not be written to; check permissions or name another place")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
