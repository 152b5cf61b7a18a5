"""What tells one large data set from another without reading it whole."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from vla_policy.core.files import sha256_file


def signature(root: Path, read: Iterable[Path], sized: Iterable[Path]) -> str:
    """Hex sha256 over the contents of the files `read`, and over names and sizes of the files `sized`, below `root`."""
    digest = hashlib.sha256()
    for path in sorted(set(read)):
        digest.update(f"{path.relative_to(root).as_posix()}\0{sha256_file(path)}\n".encode())
    for path in sorted(set(sized)):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()
