"""CUDA graphs on pycuda's streams: what was enqueued once is launched again as one piece, without the cost per kernel.

pycuda has memory, streams and contexts but no capture, so four functions of the driver, which every machine with a GPU
has, are called directly. Run on an H100 on torch's streams, with pycuda's only against a stand-in for the driver.
"""

import ctypes
from collections.abc import Callable
from typing import Any

from vla_policy.core.errors import ArtefactError

_LIBRARY = "libcuda.so.1"
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may use the GPU meanwhile


def load_driver() -> Any:
    """The CUDA driver's library. Raises ArtefactError where there is none."""
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise ArtefactError(f"no NVIDIA driver ({error}); engines for TensorRT run on an NVIDIA GPU") from error


class CudaGraph:
    """A captured piece of work. It reads and writes the addresses that it was captured with."""

    def __init__(self, driver: Any, executable: ctypes.c_void_p) -> None:
        self._driver, self._executable = driver, executable

    @staticmethod
    def capture(driver: Any, stream: int, enqueue: Callable[[], None]) -> "CudaGraph":
        """Records what `enqueue` puts on `stream`, without running it. Raises ArtefactError with the driver's code."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        _check("begin capture", driver.cuStreamBeginCapture_v2(ctypes.c_void_p(stream), _THREAD_LOCAL))
        try:
            enqueue()
        finally:  # a stream that stays in capture is lost to all later work
            ended = driver.cuStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
        _check("end capture", ended)
        made = driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        driver.cuGraphDestroy(graph)
        _check("make the graph", made)
        return CudaGraph(driver, executable)

    def launch(self, stream: int) -> None:
        """Enqueues the whole piece. Raises ArtefactError if the driver refuses."""
        _check("launch the graph", self._driver.cuGraphLaunch(self._executable, ctypes.c_void_p(stream)))

    def destroy(self) -> None:
        """Gives its memory back; the graph must not run any more."""
        self._driver.cuGraphExecDestroy(self._executable)


def _check(what: str, code: int) -> None:
    if code != 0:
        raise ArtefactError(f"CUDA could not {what} (CUresult {code}); see TensorRT's messages above")
