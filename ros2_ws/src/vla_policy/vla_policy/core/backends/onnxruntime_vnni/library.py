"""The custom operators' library: compiled once per user and version of its sources, then found in the cache."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from vla_policy.core.backends.onnxruntime_vnni import INSTRUCTIONS
from vla_policy.core.errors import ArtefactError
from vla_policy.core.processor import cpu_lacks, cpu_name

DOMAIN = "vla_policy"
_SOURCES = tuple(map(Path(__file__).with_name, ("operators.cpp", "quantized_linear.cpp", "causal_attention.cpp")))
_HEADERS = tuple(map(Path(__file__).with_name, ("operators.h", "ort_abi.h", "scratch.h")))
_FLAGS = ("-std=c++20", "-O3", "-march=x86-64-v4", "-mavx512vnni", "-shared", "-fPIC")
_WHO = "backend onnxruntime_vnni"
_INSTEAD = "or build the engine for ONNX Runtime's own kernels: engine_build build --backend onnxruntime"


def compiler() -> str | None:
    """The C++ compiler's path: $CXX, or g++; None where there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


def library() -> Path:
    """The shared library for this processor, compiled if it is not in the cache.

    Raises ArtefactError for a processor that lacks the instructions, a missing compiler, and one that fails.
    """
    lacking = cpu_lacks(INSTRUCTIONS)
    if lacking:
        raise ArtefactError(f"{_WHO}: {cpu_name()} lacks {', '.join(lacking)}; take another machine, {_INSTEAD}")
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for source in (*_SOURCES, *_HEADERS):
        digest.update(source.read_bytes())
    path = _cache() / f"operators-{digest.hexdigest()[:16]}.so"
    if not path.is_file():
        _compile(path)
    return path


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla_policy"


def _compile(path: Path) -> None:
    """Into a file of another name first: processes that start together must not load each other's halves."""
    found = compiler()
    if found is None:
        raise ArtefactError(
            f"{_WHO}: {os.environ.get('CXX') or 'g++'} is not found; install g++ 11 or later, {_INSTEAD}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [found, *_FLAGS, *map(str, _SOURCES), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                why = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
                raise ArtefactError(f"{_WHO}: {found} cannot compile its kernels ({why.strip()}); {_INSTEAD}")
            os.replace(made, path)
    except OSError as error:
        raise ArtefactError(
            f"{path.parent}: compiled kernels cannot be kept there ({error.strerror}); let "
            "XDG_CACHE_HOME name a folder that can be written"
        ) from error
