"""Writing safetensors: a disk that refuses is an OSError, as it is for any other file."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file


@contextmanager
def disk_errors() -> Iterator[None]:
    """Inside, what safetensors says when the disk refuses becomes an OSError, which `core.outputs` puts into words."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], kind: str) -> None:
    """Writes `tensors` to `path`, a temporary name of the caller's. kind: of the artefact, in the file's metadata.

    Views are written as they read; safetensors would write a transposed one's memory under the other shape.
    """
    rows = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    with disk_errors():
        save_file(rows, path, metadata={"kind": kind})
