"""Executes an engine with TensorRT or TensorRT-RTX; pycuda holds device memory and the stream.

The cache lives in two sets of buffers on the device: each call reads one and writes the other, in turns.

A decode step is hundreds of short kernels, whose launches would cost more than they do. So each step of a decision has
a context of its own, with the shapes that it has while prompts keep their length, and from its second time on it is one
CUDA graph. TensorRT wants the first time to run plainly, and a context to be left as it was captured.

Written against the documented interfaces and tested with stand-ins for them; not yet run on a GPU.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_policy.core.backends.cuda_graph import CudaGraph, load_driver
from vla_policy.core.errors import ArtefactError, EngineError
from vla_policy.core.manifest import Manifest, TensorSpec
from vla_policy.core.targets import find_target

if TYPE_CHECKING:
    import tensorrt as trt

_PREFILL, _STEP = 0, 1
_EMPTY_BYTES = 256  # TensorRT wants an address for tensors without elements, too


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


class _Step:
    """One decode step of a decision: a context that nobody changes, and its graph once there is one."""

    def __init__(self, context: "trt.IExecutionContext") -> None:
        self.context = context
        self.graph: CudaGraph | None = None
        self.warm = False


class TensorRtBackend:
    """Vision and decoder engines on GPU 0, the decoder with one context for prefill and one for each step."""

    def __init__(self, folder: Path, manifest: Manifest, modules: Modules) -> None:
        if TYPE_CHECKING:
            import tensorrt
        else:
            tensorrt = modules.tensorrt
        self._version, self._cuda, self._driver = tensorrt.__version__, modules.cuda, modules.driver
        self._check(folder, manifest)
        self._device = self._cuda.Device(0).retain_primary_context()
        self._config = manifest.config
        decoder = manifest.graphs["decoder"]
        self._past = [spec.name for spec in decoder.inputs if spec.name.startswith("past_")]
        self._result, *present = decoder.outputs
        self._present = [spec.name for spec in present]
        self._state = next((spec for spec in decoder.inputs if spec.name == "state"), None)
        self._filled = 0
        self._turn = 0
        self._steps: dict[int, _Step] = {}
        self._steps_of = 0  # the prompt's length that they are for
        with self._current():
            self._stream = self._cuda.Stream()
            self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
            vision = self._deserialize(folder, manifest, manifest.graphs["vision"].file)
            self._engine = self._deserialize(folder, manifest, decoder.file)
            self._vision = vision.create_execution_context()
            self._prefill = self._context(_PREFILL)
            self._buffers = self._allocate(manifest)

    def encode(self, pixel_values: np.ndarray) -> int:
        """Leaves the patches on the device; returns their address."""
        with self._current():
            self._upload("pixel_values", pixel_values)
            self._vision.set_tensor_address("pixel_values", int(self._buffers["pixel_values"]))
            self._vision.set_tensor_address("patches", int(self._buffers["patches"]))
            self._execute(self._vision)
            return int(self._buffers["patches"])

    def prefill(self, input_ids: np.ndarray, patches: int, state: np.ndarray | None = None) -> np.ndarray:
        self._filled = self._turn = 0
        count = self._config.num_patches
        self._check_length(input_ids.shape[1] + count)
        with self._current():
            self._upload("input_ids", input_ids)
            if state is not None and self._state is not None:
                self._upload("state", state.astype(self._state.dtype))
                self._prefill.set_tensor_address("state", int(self._buffers["state"]))
            self._bind(self._prefill, input_ids.shape[1], count, patches)
            self._execute(self._prefill)
            result = self._read_result()
            self._filled = input_ids.shape[1] + count
            if self._steps_of != self._filled:
                self._forget_steps()
        return result

    def step(self, token: int) -> np.ndarray:
        self._check_length(self._filled + 1)
        with self._current():
            self._upload("input_ids", np.asarray([[token]], np.int64))
            if self._filled not in self._steps:
                self._steps[self._filled] = _Step(self._context(_STEP))
                self._bind(self._steps[self._filled].context, 1, 0, int(self._buffers["patches"]))
            self._run_step(self._steps[self._filled])
            result = self._read_result()
        self._filled += 1
        return result

    def _run_step(self, step: _Step) -> None:
        """Plainly at first, then as a graph."""
        if not step.warm:
            self._execute(step.context)
            step.warm = True
            return
        if step.graph is None:
            stream = self._stream.handle
            step.graph = CudaGraph.capture(self._driver, stream, lambda: self._execute(step.context))
        step.graph.launch(self._stream.handle)

    def _forget_steps(self) -> None:
        """Steps after a prompt of another length have other shapes."""
        for step in self._steps.values():
            if step.graph is not None:
                step.graph.destroy()
        self._steps.clear()
        self._steps_of = self._filled

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
        engine = self._runtime.deserialize_cuda_engine(manifest.read_file(folder, file))
        if engine is None:
            raise ArtefactError(f"{folder / file}: TensorRT {self._version} cannot load it; build the engine again")
        return engine

    def _context(self, profile: int) -> "trt.IExecutionContext":
        context = self._engine.create_execution_context()
        context.set_optimization_profile_async(profile, self._stream.handle)
        return context

    def _allocate(self, manifest: Manifest) -> dict[str, Any]:
        """Device memory for every tensor at its largest; two of each cache tensor."""
        longest: dict[str, tuple[int, ...]] = {
            name: tuple(self._engine.get_tensor_profile_shape(name, _STEP)[2]) for name in self._past
        }
        ids = int(self._engine.get_tensor_profile_shape("input_ids", _PREFILL)[2][1])
        # One place less than the cache with the step's own: `_check_length`.
        cached = [int(shape[2]) for shape in longest.values()]
        self._capacity = cached[0] if cached else self._config.num_patches + ids - 1
        sizes: dict[str, int] = {"input_ids": ids * np.dtype(np.int64).itemsize}
        for spec in (*manifest.graphs["vision"].inputs, *manifest.graphs["vision"].outputs):
            sizes[spec.name] = _bytes(spec)
        for fixed in (self._result, *([self._state] if self._state else [])):
            sizes[fixed.name] = _bytes(fixed)
        dtypes = {spec.name: spec.dtype for spec in manifest.graphs["decoder"].inputs}
        for past, present in zip(self._past, self._present, strict=True):
            one_more = int(np.prod(longest[past])) // self._capacity + int(np.prod(longest[past]))
            sizes[past] = sizes[present] = one_more * np.dtype(dtypes[past]).itemsize
        return {name: self._cuda.mem_alloc(max(size, _EMPTY_BYTES)) for name, size in sizes.items()}

    def _check_length(self, total: int) -> None:
        if total > self._capacity + 1:
            raise ArtefactError(
                f"prompt and action take {total} places, the engine's cache has {self._capacity + 1}; "
                "shorten the instruction"
            )

    def _bind(self, context: "trt.IExecutionContext", ids: int, count: int, patches: int) -> None:
        """Gives a decoder's context its shapes, for `ids` ids and `count` patches, and its addresses of this turn."""
        text = self._config.text
        context.set_input_shape("input_ids", (1, ids))
        context.set_input_shape("patches", (1, count, text.hidden_size))
        context.set_tensor_address("patches", patches)
        for name in ("input_ids", self._result.name):
            context.set_tensor_address(name, int(self._buffers[name]))
        for past, present in zip(self._past, self._present, strict=True):
            read, written = (past, present) if self._turn % 2 == 0 else (present, past)
            context.set_input_shape(past, (1, text.num_key_value_heads, self._filled, text.head_dim))
            context.set_tensor_address(past, int(self._buffers[read]))
            context.set_tensor_address(present, int(self._buffers[written]))

    def _read_result(self) -> np.ndarray:
        """What the decoder wrote, once it has; the next call reads the cache that this one wrote."""
        result: np.ndarray = np.empty([int(size) for size in self._result.shape[1:]], np.float32)
        self._cuda.memcpy_dtoh_async(result, self._buffers[self._result.name], self._stream)
        self._stream.synchronize()
        self._turn += 1
        return result

    def _upload(self, name: str, values: np.ndarray) -> None:
        self._cuda.memcpy_htod_async(self._buffers[name], np.ascontiguousarray(values), self._stream)

    def _execute(self, context: "trt.IExecutionContext") -> None:
        if not context.execute_async_v3(self._stream.handle):
            raise EngineError("TensorRT refused to run the engine; see its message above")


def _bytes(spec: TensorSpec) -> int:
    """Size of a tensor without free dimensions."""
    return int(np.prod([int(size) for size in spec.shape])) * np.dtype(spec.dtype).itemsize
