"""Runs this package's CUDA kernels on the CPU: the same source, compiled by g++ with the headers in `cuda_on_cpu`."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from engine_build.backends.tensorrt.kernels import FOLDER, Kernel

_HEADERS = Path(__file__).with_name("cuda_on_cpu")


@functools.cache
def _compiled(kernel: Kernel) -> Any:
    """The kernel's host function. Its file may go once it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernel.so"
        includes = [f"-I{_HEADERS}", f"-I{FOLDER}", f'-DSOURCE="{kernel.source.name}"']
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", *includes]
        subprocess.run([*command, *kernel.definitions, "-o", str(library), str(_HEADERS / "kernel.cpp")], check=True)
        return ctypes.c_void_p.in_dll(ctypes.CDLL(str(library)), "run").value


def run_kernel(
    kernel: Kernel, grid: tuple[int, int], arguments: list[np.ndarray | int], backwards: bool = False
) -> None:
    """Launches the kernel. Arrays, outputs among them, are passed by address. backwards: order of the threads."""
    types = [ctypes.c_void_p if isinstance(value, np.ndarray) else ctypes.c_int for value in arguments]
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int] * 4, *types)(_compiled(kernel))
    values = [value.ctypes.data if isinstance(value, np.ndarray) else value for value in arguments]
    call(*grid, kernel.threads, int(backwards), *values)
