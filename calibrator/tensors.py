"""Writing safetensors: a disk that refuses becomes an error for the user."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vla_policy.core.errors import ArtefactError


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `tensors` to `path`, a temporary name of the caller's. Raises ArtefactError when the disk refuses."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise ArtefactError(
            f"{path.parent}: tensors cannot be written ({error}); check free space and permissions"
        ) from error
