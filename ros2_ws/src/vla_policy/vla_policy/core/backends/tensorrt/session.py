"""Executes an engine with TensorRT or TensorRT-RTX; pycuda holds device memory and the stream.

Every tensor has one place on the device (`memory`), and a call has a few sizes, up to which what it is fed with is
filled. So all that can ever run is known when an engine is opened: each call at each of its sizes has a context that
nobody changes any more, is run once, and then captured as a CUDA graph, without which a short call would cost more for
launching its hundreds of kernels than for running them. No prompt, of whatever length, meets anything new afterwards.
Where the driver cannot capture a call, it goes on being launched plainly, and `processor` says so.

All contexts compute in one piece of device memory, one after the other on one stream. Engines are mapped while they are
loaded, so that a Jetson, whose GPU has no memory of its own, does not hold them twice. A call ends when the GPU has
finished it, so that its time is that of its work.

Written against the documented interfaces and tested with stand-ins for them; not yet run on a GPU.
"""

import importlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_policy.core.backends.tensorrt.cuda_graph import CudaGraph, load_driver
from vla_policy.core.backends.tensorrt.memory import Appending, Memory
from vla_policy.core.errors import ArtefactError, EngineError
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import COUNT, POSITION, ROWS, TensorSpec, profiles
from vla_policy.core.targets import find_target

if TYPE_CHECKING:
    import tensorrt as trt

_SMALLEST_BYTES = 256


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
    """A tensor on the device. writing: which writing of its place it is. rows: of the sequence, that are in it."""

    address: int
    shape: tuple[int, ...]
    writing: int
    rows: int


class Ready:
    """A call at one of its sizes: a context that nobody changes any more, and its graph unless it is launched plainly.

    sizes: of the named dimensions. shapes: of all inputs and outputs.
    """

    def __init__(
        self,
        context: "trt.IExecutionContext",
        sizes: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        appending: Appending | None,
    ) -> None:
        self.context, self.sizes, self.shapes, self.appending = context, sizes, shapes, appending
        self.graph: CudaGraph | None = None


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
        self._writings: dict[int, int] = {}  # of every place that something is kept at
        with self._current():
            self._stream = self._cuda.Stream()
            self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
            self._engines = {
                name: self._deserialize(folder, manifest, graph.file) for name, graph in self._graphs.items()
            }
            self._managed = tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
            needed = [int(engine.device_memory_size_v2) for engine in self._engines.values()]
            self._scratch_bytes = max(_SMALLEST_BYTES, *needed)
            self._scratch = self._cuda.mem_alloc(self._scratch_bytes)
            self._memory = Memory(self._graphs, self._program, self._zeros)
            self._ready = {call: self._make_ready(call) for call in self._program}

    @property
    def processor(self) -> str:
        """The GPU, and, where calls cannot be CUDA graphs, why."""
        return f"{self._gpu} ({self._uncaptured})" if self._uncaptured else self._gpu

    def run(self, call: str, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        ready = self._fitting(call, feeds)
        with self._current():
            counts = self._feed(call, ready, feeds)
            self._check_length(call, ready, counts)
            if ready.graph is not None:
                ready.graph.launch(self._stream.handle)
            else:
                self._enqueue(ready)
            self._append(ready, counts)
            results = self._results(call, ready, feeds, keep, counts)
            self._stream.synchronize()
        return results

    def _make_ready(self, call: str) -> list[Ready]:
        """The call at each of its sizes, run once and captured."""
        graph = self._program[call].graph
        spec, known = self._graphs[graph], profiles(graph, self._graphs, self._program)
        made = []
        for variant in self._program[call].variants():
            sizes = {name: bounds.smallest for name, bounds in variant.items()}
            shapes = {tensor.name: _shape(tensor, sizes) for tensor in (*spec.inputs, *spec.outputs)}
            context = self._new_context(graph)
            number = next((n for n, one in enumerate(known) if (one.call, dict(one.sizes)) == (call, variant)), 0)
            context.set_optimization_profile_async(number, self._stream.handle)
            for tensor in spec.inputs:
                context.set_input_shape(tensor.name, shapes[tensor.name])
            for name, address in self._memory.addresses(call, sizes).items():
                context.set_tensor_address(name, address)
            made.append(Ready(context, sizes, shapes, self._memory.appending(call, sizes)))
            self._enqueue(made[-1])  # TensorRT wants the first time to be a plain one
            self._stream.synchronize()
            if self._captures():
                self._capture(made[-1])
        return made

    def _fitting(self, call: str, feeds: Mapping[str, Any]) -> Ready:
        """The smallest size that what is fed fits in. Raises ArtefactError where the engine was built for no such."""
        spec = self._graphs[self._program[call].graph]
        for ready in self._ready[call]:
            if all(self._fits(call, tensor, ready, feeds[tensor.name]) for tensor in spec.inputs):
                return ready
        for tensor in spec.inputs:
            if not any(self._fits(call, tensor, ready, feeds[tensor.name]) for ready in self._ready[call]):
                break
        sizes = {name: size for name, size in self._program[call].sizes.items() if name in tensor.shape}
        ranges = ", ".join(f"{name} from {size.smallest} to {size.largest}" for name, size in sizes.items())
        raise ArtefactError(
            f"call {call}: {tensor.name} has shape {list(feeds[tensor.name].shape)}, expected {list(tensor.shape)}"
            f"{' with ' if ranges else ''}{ranges}; the engine was built for no other"
        )

    def _fits(self, call: str, tensor: TensorSpec, ready: Ready, value: Any) -> bool:
        """Whether a value has an input's shape, or, if it can be filled up, less in dimensions that have steps."""
        if value is None:
            return True
        wanted, bounds = ready.shapes[tensor.name], self._program[call].sizes
        if len(value.shape) != len(wanted):
            return False
        for have, want, name in zip(value.shape, wanted, tensor.shape, strict=True):
            filled = isinstance(value, np.ndarray) and isinstance(name, str) and bool(bounds[name].steps)
            if have != want and not (filled and bounds[str(name)].smallest <= have < want):
                return False
        return True

    def _feed(self, call: str, ready: Ready, feeds: Mapping[str, Any]) -> dict[str, int]:
        """Brings what is fed to its place; returns what `COUNT` and `POSITION` are."""
        graph, filling, position = self._program[call].graph, 0, 0
        inputs = self._graphs[graph].inputs
        for tensor in inputs:
            value, shape = feeds[tensor.name], ready.shapes[tensor.name]
            if isinstance(value, Kept):
                if self._writings.get(value.address) != value.writing:
                    raise ArtefactError(f"call {call}: what {tensor.name} is fed with was overwritten by a later call")
                position = max(position, value.rows)
            elif value is not None:
                filling = max(filling, *(want - have for want, have in zip(shape, value.shape, strict=True)))
                self._upload(graph, tensor, _filled(value, shape))
        counts = {COUNT: ready.sizes.get(ROWS, 0) - filling, POSITION: position}
        for tensor in inputs:
            if tensor.name in counts and feeds[tensor.name] is None:
                self._upload(graph, tensor, np.asarray([counts[tensor.name]], tensor.dtype))
        return counts

    def _check_length(self, call: str, ready: Ready, counts: Mapping[str, int]) -> None:
        """Raises ArtefactError where a call's rows, filling included, would leave the cache."""
        longest, end = self._memory.longest(call), counts[POSITION] + ready.sizes.get(ROWS, 0)
        if longest is not None and end > longest:
            raise ArtefactError(f"call {call}: {end} rows, the engine's cache was built for {longest}")

    def _upload(self, graph: str, tensor: TensorSpec, values: np.ndarray) -> None:
        self._cuda.memcpy_htod_async(self._memory.address(graph, tensor.name), values, self._stream)

    def _append(self, ready: Ready, counts: Mapping[str, int]) -> None:
        """Brings new rows of a cache behind the others."""
        if (move := ready.appending) is None:
            return
        copy = self._cuda.Memcpy2D()
        copy.set_src_device(move.source)
        copy.set_dst_device(move.target + counts[POSITION] * move.row)
        copy.src_pitch, copy.dst_pitch = move.source_pitch, move.target_pitch
        copy.width_in_bytes, copy.height = counts[COUNT] * move.row, move.tensors
        copy(self._stream)

    def _results(
        self, call: str, ready: Ready, feeds: Mapping[str, Any], keep: Collection[str], counts: Mapping[str, int]
    ) -> dict[str, Any]:
        """Outputs as handles, or as arrays that are filled once the stream is synchronised."""
        called = self._program[call]
        spec, fed = self._graphs[called.graph], {value.address for value in feeds.values() if isinstance(value, Kept)}
        inputs = {tensor.name: tensor for graph in self._graphs.values() for tensor in graph.inputs}
        results: dict[str, Any] = {}
        written: set[int] = set()
        for tensor in spec.outputs:
            if tensor.name not in keep:
                results[tensor.name] = np.empty(ready.shapes[tensor.name], tensor.dtype)
                address = self._memory.address(called.graph, tensor.name)
                self._cuda.memcpy_dtoh_async(results[tensor.name], address, self._stream)
                continue
            target = called.kept[tensor.name]
            shape = ready.shapes[tensor.name]
            if tensor.name in called.appended:
                shape = _shape(inputs[target], ready.sizes)
            address = self._memory.kept(target)
            if address not in fed | written:
                self._writings[address] = self._writings.get(address, 0) + 1
            written.add(address)
            results[tensor.name] = Kept(address, shape, self._writings[address], counts[POSITION] + counts[COUNT])
        return results

    def _new_context(self, graph: str) -> "trt.IExecutionContext":
        """A context that computes in the memory that all share."""
        context = self._engines[graph].create_execution_context(self._managed)
        context.set_device_memory(int(self._scratch), self._scratch_bytes)
        return context

    def _zeros(self, size: int) -> Any:
        """Device memory: what lies there unused is read, too, and hidden by a mask, which NaN would get through."""
        memory = self._cuda.mem_alloc(size)
        self._cuda.memset_d8(memory, 0, size)
        return memory

    def _captures(self) -> bool:
        """Whether calls become CUDA graphs."""
        return True

    def _capture(self, ready: Ready) -> None:
        try:
            ready.graph = CudaGraph.capture(self._driver, self._stream.handle, lambda: self._enqueue(ready))
        except (ArtefactError, EngineError) as error:
            self._uncaptured = f"no CUDA graphs, launched plainly: {error}"

    def _enqueue(self, ready: Ready) -> None:
        if not ready.context.execute_async_v3(self._stream.handle):
            raise EngineError("TensorRT refused to run the engine; see its message above")

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


def _shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)


def _filled(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A value behind which zeros are, up to `shape`."""
    if value.shape == shape:
        return np.ascontiguousarray(value)
    whole = np.zeros(shape, value.dtype)
    whole[tuple(slice(size) for size in value.shape)] = value
    return whole
