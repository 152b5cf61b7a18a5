"""Sessions that show values inside TensorRT engines: debug tensors, told to a listener while the engine runs.

Marking a value as a debug tensor keeps TensorRT from fusing across it (its documentation of `mark_debug`), and fused
values exist nowhere. So these engines are built for this purpose, from the very graphs of the engine that is served.
What they prove is proven of these graphs, this TensorRT and this GPU; the served engine's formats are read back, and
its decisions compared, apart.

Listeners are not part of a CUDA graph, so that every call is launched plainly. Written against the documented
interfaces and tested with stand-ins for them; the engines are built here, and were not run.
"""

import ctypes
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine_build.backends.base import Seen, Written
from engine_build.backends.tensorrt.builder import Module, build_engines
from engine_build.compiled import linked
from vla_policy.core.backends.tensorrt.plugin_library import load_plugins
from vla_policy.core.backends.tensorrt.session import Modules, Ready, TensorRtSession, load_modules
from vla_policy.core.manifest import Manifest, file_records
from vla_policy.core.program import COUNT, ROWS, Session
from vla_policy.core.targets import Target

if TYPE_CHECKING:
    import tensorrt as trt


def open_tapped(
    module: Module,
    target: Target,
    written: Written,
    manifest: Manifest,
    taps: Mapping[str, Collection[str]],
    seen: Seen,
    scratch: Path,
) -> Session:
    """See `Backend.open_tapped`."""
    modules = load_modules(module.name)
    folder = scratch / "tapped"
    folder.mkdir()
    with linked(written, folder) as here:
        graphs = build_engines(module, target, here, folder, taps)
    shown = replace(
        manifest, graphs=graphs, files=file_records(folder), backend_version=modules.tensorrt.__version__
    )
    load_plugins(folder, shown, modules.tensorrt)
    return TappedSession(folder, shown, modules, taps, seen)


class TappedSession(TensorRtSession):
    """The runner's session on engines that were built to show values. taps, seen: see `Backend.open_tapped`."""

    def __init__(
        self, folder: Path, manifest: Manifest, modules: Modules, taps: Mapping[str, Collection[str]], seen: Seen
    ) -> None:
        self._taps, self._seen, self._modules = taps, seen, modules
        self._told: dict[str, np.ndarray] = {}
        super().__init__(folder, manifest, modules)

    def run(self, call: str, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        graph = self._program[call].graph
        self._told = {}
        results = super().run(call, feeds, keep)
        for spec in self._graphs[graph].inputs:
            if spec.name in self._taps.get(graph, ()):
                self._told[spec.name] = self._value(feeds[spec.name], spec.dtype)
        for name in self._taps.get(graph, ()):
            self._seen(graph, name, self._without_filling(self._told[name]).astype(np.float32))
        return results

    def _feed(self, call: str, ready: Ready, feeds: Mapping[str, Any]) -> dict[str, int]:
        counts = super()._feed(call, ready, feeds)
        rows = ready.sizes.get(ROWS, 0)
        self._filled, self._filling = set(ready.sizes.values()), rows - counts[COUNT]
        return counts

    def _without_filling(self, value: np.ndarray) -> np.ndarray:
        """A value [1, rows, ..] of the sequence as it is without filling, any other as it is."""
        if not self._filling or value.ndim < 2 or value.shape[1] not in self._filled:
            return value
        return value[:, : value.shape[1] - self._filling]

    def _new_context(self, graph: str) -> "trt.IExecutionContext":
        context = super()._new_context(graph)
        inputs = {spec.name for spec in self._graphs[graph].inputs}
        for name in self._taps.get(graph, ()):
            if name not in inputs:
                context.set_tensor_debug_state(name, True)
        self._listener = listener(self._modules.tensorrt, self._tell)
        context.set_debug_listener(self._listener)
        return context

    def _captures(self) -> bool:
        return False

    def _tell(self, address: int, dtype: Any, shape: tuple[int, ...], name: str) -> None:
        values = np.empty(shape, self._modules.tensorrt.nptype(dtype))
        self._stream.synchronize()
        self._cuda.memcpy_dtoh(values, address)
        self._told[name] = values

    def _value(self, fed: Any, dtype: str) -> np.ndarray:
        if isinstance(fed, np.ndarray):
            return fed
        values = np.empty(fed.shape, dtype)
        with self._current():
            self._cuda.memcpy_dtoh(values, fed.address)
        return values


def listener(tensorrt: Any, tell: Callable[[int, Any, tuple[int, ...], str], None]) -> Any:
    """A debug listener that passes on what it is told; an address comes in a capsule."""

    class Listener(tensorrt.IDebugListener):
        def __init__(self) -> None:
            tensorrt.IDebugListener.__init__(self)

        def process_debug_tensor(self, addr: Any, location: Any, type: Any, shape: Any, name: str, stream: int) -> bool:
            tell(pointer(addr), type, tuple(int(shape[axis]) for axis in range(len(shape))), name)
            return True

    return Listener()


def pointer(capsule: Any) -> int:
    """The address that a PyCapsule holds."""
    if isinstance(capsule, int):
        return capsule
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return int(api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule)))
