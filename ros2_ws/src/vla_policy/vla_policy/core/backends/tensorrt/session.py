"""Executes an engine with TensorRT or TensorRT-RTX; pycuda holds device memory and the stream.

What a call keeps lies in one of two buffers on the device, never in the one that the call is fed with.

A short call is hundreds of short kernels, whose launches would cost more than they do. So calls of the same shapes and
addresses, such as the n-th decode step after prompts of one length, have a context of their own, and from its second
time on it is one CUDA graph. TensorRT wants the first time to run plainly, and a context to be left as it was captured.
Where the driver cannot capture a call, it goes on being launched plainly, and `processor` says so.

All contexts compute in one piece of device memory, one after the other on one stream. Engines are mapped while they are
loaded, so that a Jetson, whose GPU has no memory of its own, does not hold them twice.

Written against the documented interfaces and tested with stand-ins for them; not yet run on a GPU.
"""

import importlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_policy.core.backends.tensorrt.cuda_graph import CudaGraph, load_driver
from vla_policy.core.errors import ArtefactError, EngineError
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import TensorSpec, profiles
from vla_policy.core.targets import find_target

if TYPE_CHECKING:
    import tensorrt as trt

_SMALLEST_BYTES = 256  # TensorRT wants an address for tensors without elements, too
_CONTEXTS = 32  # a decision of OpenVLA's takes eight while prompts keep their length


class Modules:
    """What only a machine with a GPU has: TensorRT, `pycuda.driver`, and the driver's library itself."""

    def __init__(self, tensorrt: Any, cuda: Any, driver: Any) -> None:
        self.tensorrt = tensorrt
        self.cuda = cuda
        self.driver = driver


def load_modules(backend: str) -> Modules:
    """Raises ArtefactError saying what is missing: the package, pycuda, or the driver."""
    try:
        tensorrt, cuda = importlib.import_module(backend), importlib.import_module("pycuda.driver")
    except ImportError as error:
        raise ArtefactError(f"an engine for {backend} needs {backend} and pycuda ({error}); install them") from error
    if not hasattr(tensorrt, "Runtime"):
        raise ArtefactError(f"an engine for {backend} needs {backend}, only its type stubs are installed; install it")
    try:
        cuda.init()
    except cuda.Error as error:
        raise ArtefactError(f"no usable NVIDIA driver ({error}); engines for {backend} run on an NVIDIA GPU") from error
    return Modules(tensorrt, cuda, load_driver())


@dataclass(frozen=True)
class Kept:
    """A tensor on the device. writing: which writing of its buffer it is."""

    address: int
    shape: tuple[int, ...]
    writing: int


@dataclass(frozen=True)
class _Binding:
    """Everything that a context is told: shapes of the inputs, addresses of all tensors."""

    call: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    addresses: tuple[tuple[str, int], ...]


class _Bound:
    """A context that nobody changes any more, and its graph once there is one."""

    def __init__(self, context: "trt.IExecutionContext") -> None:
        self.context = context
        self.graph: CudaGraph | None = None
        self.warm = False
        self.plain = False


class TensorRtSession:
    """The engine's graphs on GPU 0."""

    def __init__(self, folder: Path, manifest: Manifest, modules: Modules) -> None:
        if TYPE_CHECKING:
            import tensorrt
        else:
            tensorrt = modules.tensorrt
        self._version, self._cuda, self._driver = tensorrt.__version__, modules.cuda, modules.driver
        self._check(folder, manifest)
        self._graphs, self._program = manifest.graphs, manifest.program
        self._gpu, self._uncaptured = str(self._cuda.Device(0).name()), ""
        self._device = self._cuda.Device(0).retain_primary_context()
        self._buffers: dict[tuple[str, str, int], Any] = {}
        self._writings: dict[int, int] = {}  # of every buffer that an output was written to
        self._bound: OrderedDict[_Binding, _Bound] = OrderedDict()
        with self._current():
            self._stream = self._cuda.Stream()
            self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
            self._engines = {
                name: self._deserialize(folder, manifest, graph.file) for name, graph in self._graphs.items()
            }
            self._nothing = self._cuda.mem_alloc(_SMALLEST_BYTES)
            self._managed = tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
            needed = [int(engine.device_memory_size_v2) for engine in self._engines.values()]
            self._scratch_bytes = max(_SMALLEST_BYTES, *needed)
            self._scratch = self._cuda.mem_alloc(self._scratch_bytes)

    @property
    def processor(self) -> str:
        """The GPU, and, where calls cannot be CUDA graphs, why."""
        return f"{self._gpu} ({self._uncaptured})" if self._uncaptured else self._gpu

    def run(self, call: str, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        graph = self._graphs[self._program[call].graph]
        shapes = {spec.name: self._checked_shape(call, spec, feeds[spec.name]) for spec in graph.inputs}
        with self._current():
            addresses = {spec.name: self._fed(call, spec, feeds[spec.name]) for spec in graph.inputs}
            fed = frozenset(addresses.values())
            addresses |= {spec.name: self._written(call, spec, fed) for spec in graph.outputs}
            bound = self._bind(_Binding(call, tuple(shapes.items()), tuple(addresses.items())))
            self._execute(bound)
            results = {
                spec.name: self._result(bound, spec, addresses[spec.name], spec.name in keep) for spec in graph.outputs
            }
            self._stream.synchronize()
        return results

    def _checked_shape(self, call: str, spec: TensorSpec, value: Any) -> tuple[int, ...]:
        """The shape of what is fed. Raises ArtefactError where it is not one that the engine was built for."""
        shape, sizes = tuple(int(size) for size in value.shape), self._program[call].sizes
        if len(shape) != len(spec.shape):
            raise ArtefactError(f"call {call}: {spec.name} has shape {list(shape)}, expected {list(spec.shape)}")
        for size, expected in zip(shape, spec.shape, strict=True):
            smallest, largest = expected, expected
            if isinstance(expected, str):
                smallest, largest = sizes[expected].smallest, sizes[expected].largest
            if not int(smallest) <= size <= int(largest):
                raise ArtefactError(
                    f"call {call}: {spec.name} has shape {list(shape)}, expected {list(spec.shape)} with {expected} "
                    f"from {smallest} to {largest}; the engine was built for no other"
                )
        return shape

    def _fed(self, call: str, spec: TensorSpec, value: Any) -> int:
        """Where an input lies; an array is brought there."""
        if isinstance(value, Kept):
            if self._writings[value.address] != value.writing:
                raise ArtefactError(f"call {call}: what {spec.name} is fed with was overwritten by a later call")
            return value.address
        if value.size == 0:
            return int(self._nothing)
        buffer = self._buffer(call, spec, 0)
        self._cuda.memcpy_htod_async(buffer, np.ascontiguousarray(value), self._stream)
        return int(buffer)

    def _written(self, call: str, spec: TensorSpec, fed: Collection[int]) -> int:
        """Where an output goes: always the first of its two buffers, unless the call reads that."""
        address = int(self._buffer(call, spec, 0))
        if address in fed:
            address = int(self._buffer(call, spec, 1))
        self._writings[address] = self._writings.get(address, 0) + 1
        return address

    def _buffer(self, call: str, spec: TensorSpec, place: int) -> Any:
        """Device memory for a tensor of the call's graph at its largest."""
        graph = self._program[call].graph
        if (graph, spec.name, place) not in self._buffers:
            calls = [other for other in self._program.values() if other.graph == graph]
            sizes = [
                max(other.sizes[size].largest for other in calls) if isinstance(size, str) else size
                for size in spec.shape
            ]
            needed = int(np.prod(sizes)) * np.dtype(spec.dtype).itemsize
            self._buffers[graph, spec.name, place] = self._cuda.mem_alloc(max(needed, _SMALLEST_BYTES))
        return self._buffers[graph, spec.name, place]

    def _bind(self, binding: _Binding) -> _Bound:
        """The context of a binding, a new one at its first time; those that were not used for longest go."""
        if binding not in self._bound:
            while len(self._bound) >= _CONTEXTS:
                _, oldest = self._bound.popitem(last=False)
                if oldest.graph is not None:
                    oldest.graph.destroy()
            graph = self._program[binding.call].graph
            context = self._new_context(graph)
            optimised = profiles(graph, self._graphs, self._program)
            profile = optimised.index(binding.call) if optimised else 0
            context.set_optimization_profile_async(profile, self._stream.handle)
            for name, shape in binding.shapes:
                context.set_input_shape(name, shape)
            for name, address in binding.addresses:
                context.set_tensor_address(name, address)
            self._bound[binding] = _Bound(context)
        self._bound.move_to_end(binding)
        return self._bound[binding]

    def _new_context(self, graph: str) -> "trt.IExecutionContext":
        """A context that computes in the memory that all share."""
        context = self._engines[graph].create_execution_context(self._managed)
        context.set_device_memory(int(self._scratch), self._scratch_bytes)
        return context

    def _captures(self) -> bool:
        """Whether calls become CUDA graphs."""
        return True

    def _execute(self, bound: _Bound) -> None:
        """Plainly at first, then as a graph, if the driver can make one."""
        if bound.warm and bound.graph is None and not bound.plain and self._captures():
            self._capture(bound)
        if bound.graph is not None:
            bound.graph.launch(self._stream.handle)
        else:
            self._enqueue(bound)
        bound.warm = True

    def _capture(self, bound: _Bound) -> None:
        try:
            bound.graph = CudaGraph.capture(self._driver, self._stream.handle, lambda: self._enqueue(bound))
        except (ArtefactError, EngineError) as error:
            bound.plain = True
            self._uncaptured = f"no CUDA graphs, launched plainly: {error}"

    def _enqueue(self, bound: _Bound) -> None:
        if not bound.context.execute_async_v3(self._stream.handle):
            raise EngineError("TensorRT refused to run the engine; see its message above")

    def _result(self, bound: _Bound, spec: TensorSpec, address: int, keep: bool) -> Any:
        """An output as a handle, or as an array that is filled once the stream is synchronised."""
        sizes = bound.context.get_tensor_shape(spec.name)
        shape = tuple(int(sizes[place]) for place in range(len(spec.shape)))
        if keep:
            return Kept(address, shape, self._writings[address])
        values = np.empty(shape, spec.dtype)
        self._cuda.memcpy_dtoh_async(values, address, self._stream)
        return values

    def _check(self, folder: Path, manifest: Manifest) -> None:
        wanted = find_target(manifest.target).compute_capability
        here = self._cuda.Device(0).compute_capability()
        if here != wanted:
            raise ArtefactError(
                f"{folder}: built for target {manifest.target}, compute capability {wanted}; this GPU has {here}; "
                "build the engine for this GPU"
            )
        if self._version != manifest.backend_version:
            raise ArtefactError(
                f"{folder}: built with {manifest.backend} {manifest.backend_version}, installed is "
                f"{self._version}; install that version or build the engine again"
            )

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The GPU's context belongs to a thread; whoever calls takes it for the time of the call."""
        self._device.push()
        try:
            yield
        finally:
            self._device.pop()

    def _deserialize(self, folder: Path, manifest: Manifest, file: str) -> "trt.ICudaEngine":
        with manifest.mapped_file(folder, file) as content:
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise ArtefactError(f"{folder / file}: TensorRT {self._version} cannot load it; build the engine again")
        return engine
