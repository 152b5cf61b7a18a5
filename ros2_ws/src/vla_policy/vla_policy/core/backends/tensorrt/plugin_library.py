"""The plugin library that an engine brings where its TensorRT embeds no compiled kernels: JetPack 6 has 10.3.

A process registers its plugins once, for all engines.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file
from vla_policy.core.manifest import Manifest

if TYPE_CHECKING:
    import tensorrt as trt

LIBRARY = "plugins.so"
"""In an engine's folder."""

_loaded: dict[str, Path] = {}  # by hash


def load_plugins(folder: Path, manifest: Manifest, tensorrt: "trt") -> None:
    """Loads the engine's library, if it has one. Raises ArtefactError unless it is the file that was built."""
    if LIBRARY in manifest.files:
        with manifest.mapped_file(folder, LIBRARY):
            load_library(folder / LIBRARY, tensorrt)


def load_library(path: Path, tensorrt: "trt") -> None:
    """Makes the library's plugins known to TensorRT. Raises ArtefactError where they cannot be."""
    content = sha256_file(path)
    if content in _loaded:
        return
    if _loaded:
        (other,) = _loaded.values()
        raise ArtefactError(
            f"{path}: this process has the plugins of {other} already, which are others; build both engines anew"
        )
    if tensorrt.get_plugin_registry().load_library(str(path)) is None:
        raise ArtefactError(f"{path}: TensorRT {tensorrt.__version__} cannot load it; build the engine again")
    _loaded[content] = path
