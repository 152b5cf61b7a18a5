"""Executes an engine with TensorRT or TensorRT-RTX; pycuda holds device memory and the stream.

The cache lives in two sets of buffers on the device: a step reads one and writes the other, then they change places.
Written against the documented interfaces and tested with stand-ins for them; not yet run on a GPU.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vla_policy.core.errors import ArtefactError
from vla_policy.core.manifest import Manifest, TensorSpec
from vla_policy.core.targets import find_target

_PREFILL, _STEP = 0, 1
_EMPTY_BYTES = 256  # TensorRT wants an address for tensors without elements, too


class Modules:
    """The two libraries that only a machine with a GPU has."""

    def __init__(self, tensorrt: Any, cuda: Any) -> None:
        self.tensorrt = tensorrt
        self.cuda = cuda


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
    return Modules(tensorrt, cuda)


class TensorRtBackend:
    """Vision and decoder engines on GPU 0, the decoder with one context for prefill and one for steps."""

    def __init__(self, folder: Path, manifest: Manifest, modules: Modules) -> None:
        self._trt, self._cuda = modules.tensorrt, modules.cuda
        self._check(folder, manifest)
        self._device = self._cuda.Device(0).retain_primary_context()
        self._config = manifest.config
        decoder = manifest.graphs["decoder"]
        self._past = [spec.name for spec in decoder.inputs[2:]]
        self._present = [spec.name for spec in decoder.outputs[1:]]
        self._filled = 0
        with self._current():
            self._stream = self._cuda.Stream()
            logger = self._trt.Logger(self._trt.Logger.ERROR)
            self._runtime = self._trt.Runtime(logger)
            vision = self._deserialize(folder / manifest.graphs["vision"].file)
            self._engine = self._deserialize(folder / decoder.file)
            self._vision = vision.create_execution_context()
            self._contexts = [self._context(profile) for profile in (_PREFILL, _STEP)]
            self._buffers = self._allocate(manifest)

    def encode(self, pixel_values: np.ndarray) -> int:
        """Leaves the patches on the device; returns their address."""
        with self._current():
            self._upload("pixel_values", pixel_values)
            self._vision.set_tensor_address("pixel_values", int(self._buffers["pixel_values"]))
            self._vision.set_tensor_address("patches", int(self._buffers["patches"]))
            self._execute(self._vision)
            return int(self._buffers["patches"])

    def prefill(self, input_ids: np.ndarray, patches: int) -> np.ndarray:
        self._filled = 0
        return self._run(_PREFILL, input_ids, patches, self._config.num_patches)

    def step(self, token: int) -> np.ndarray:
        return self._run(_STEP, np.asarray([[token]], np.int64), int(self._buffers["patches"]), 0)

    def _check(self, folder: Path, manifest: Manifest) -> None:
        wanted = find_target(manifest.target).compute_capability
        here = self._cuda.Device(0).compute_capability()
        if here != wanted:
            raise ArtefactError(
                f"{folder}: built for target {manifest.target}, compute capability {wanted}; this GPU has {here}; "
                "build the engine for this GPU"
            )
        if self._trt.__version__ != manifest.backend_version:
            raise ArtefactError(
                f"{folder}: built with {manifest.backend} {manifest.backend_version}, installed is "
                f"{self._trt.__version__}; install that version or build the engine again"
            )

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The GPU's context belongs to a thread; whoever calls takes it for the time of the call."""
        self._device.push()
        try:
            yield
        finally:
            self._device.pop()

    def _deserialize(self, path: Path) -> Any:
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise ArtefactError(f"{path}: TensorRT {self._trt.__version__} cannot load it; build the engine again")
        return engine

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        context.set_optimization_profile_async(profile, self._stream.handle)
        return context

    def _allocate(self, manifest: Manifest) -> dict[str, Any]:
        """Device memory for every tensor at its largest; two of each cache tensor."""
        longest = {name: self._engine.get_tensor_profile_shape(name, _STEP)[2] for name in self._past}
        self._capacity = int(next(iter(longest.values()))[2])
        ids = int(self._engine.get_tensor_profile_shape("input_ids", _PREFILL)[2][1])
        sizes: dict[str, int] = {"input_ids": ids * np.dtype(np.int64).itemsize}
        for spec in (*manifest.graphs["vision"].inputs, *manifest.graphs["vision"].outputs):
            sizes[spec.name] = _bytes(spec)
        sizes["logits"] = _bytes(manifest.graphs["decoder"].outputs[0])
        dtypes = {spec.name: spec.dtype for spec in manifest.graphs["decoder"].inputs}
        for past, present in zip(self._past, self._present, strict=True):
            one_more = int(np.prod(longest[past])) // self._capacity + int(np.prod(longest[past]))
            sizes[past] = sizes[present] = one_more * np.dtype(dtypes[past]).itemsize
        return {name: self._cuda.mem_alloc(max(size, _EMPTY_BYTES)) for name, size in sizes.items()}

    def _run(self, profile: int, input_ids: np.ndarray, patches: int, count: int) -> np.ndarray:
        total = self._filled + input_ids.shape[1] + count
        if total > self._capacity + 1:
            raise ArtefactError(
                f"prompt and action take {total} places, the engine's cache has {self._capacity + 1}; "
                "shorten the instruction"
            )
        text, context = self._config.text, self._contexts[profile]
        with self._current():
            self._upload("input_ids", input_ids)
            context.set_input_shape("input_ids", input_ids.shape)
            context.set_input_shape("patches", (1, count, text.hidden_size))
            context.set_tensor_address("patches", patches)
            for past, present in zip(self._past, self._present, strict=True):
                context.set_input_shape(past, (1, text.num_key_value_heads, self._filled, text.head_dim))
                context.set_tensor_address(past, int(self._buffers[past]))
                context.set_tensor_address(present, int(self._buffers[present]))
            for name in ("input_ids", "logits"):
                context.set_tensor_address(name, int(self._buffers[name]))
            self._execute(context)
            logits = np.empty(text.vocab_size, np.float32)
            self._cuda.memcpy_dtoh_async(logits, self._buffers["logits"], self._stream)
            self._stream.synchronize()
        self._filled = total
        self._swap()
        return logits

    def _swap(self) -> None:
        """What was written becomes what is read."""
        for past, present in zip(self._past, self._present, strict=True):
            self._buffers[past], self._buffers[present] = self._buffers[present], self._buffers[past]

    def _upload(self, name: str, values: np.ndarray) -> None:
        self._cuda.memcpy_htod_async(self._buffers[name], np.ascontiguousarray(values), self._stream)

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.handle):
            raise ArtefactError("TensorRT refused to run the engine; see its message above")


def _bytes(spec: TensorSpec) -> int:
    """Size of a tensor without free dimensions."""
    return int(np.prod([int(size) for size in spec.shape])) * np.dtype(spec.dtype).itemsize
