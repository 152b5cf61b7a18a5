"""Stand-ins for TensorRT's runtime, pycuda and the driver: device memory in NumPy, engines run by ONNX Runtime."""

import ctypes
import mmap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from engine_build.backends.tensorrt.builder import Bounds, input_shapes
from vla_policy.core.backends.onnxruntime.session import open_session, session_options
from vla_policy.core.backends.tensorrt.session import Modules
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import GraphSpec, TensorSpec, profiles

VERSION = "1.0"


class FakeMemory:
    """Device memory: blocks at addresses that are multiples of 256; any address inside one can be used."""

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.next = 1 << 20
        self.shared: set[int] = set()  # what contexts compute in

    def alloc(self, size: int) -> int:
        address = self.next
        self.next += -(-size // 256) * 256 + 256
        self.blocks[address] = np.full(size, 0xFF, np.uint8)  # NaN, until somebody writes
        return address

    def find(self, address: int, size: int) -> np.ndarray:
        """The bytes there, of one block."""
        begin = max(block for block in self.blocks if block <= address)
        found = self.blocks[begin][address - begin : address - begin + size]
        assert len(found) == size, "past the end of a buffer"
        return found

    def write(self, address: int, values: np.ndarray, stream: Any = None) -> None:
        content = np.frombuffer(values.tobytes(), np.uint8)
        self.find(address, len(content))[:] = content

    def fill(self, address: int, byte: int, size: int) -> None:
        self.find(address, size)[:] = byte

    def read(self, address: int, shape: Sequence[int], dtype: str) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.find(address, size).tobytes(), dtype).reshape(shape)


class FakeCopy:
    """`pycuda.driver.Memcpy2D`: rows of bytes at one distance to rows at another."""

    def __init__(self, memory: FakeMemory) -> None:
        self.memory, self.copied = memory, 0
        self.src_pitch = self.dst_pitch = self.width_in_bytes = self.height = 0

    def set_src_device(self, address: int) -> None:
        self.source = address

    def set_dst_device(self, address: int) -> None:
        self.target = address

    def __call__(self, stream: Any) -> None:
        assert self.width_in_bytes <= min(self.src_pitch, self.dst_pitch)
        for line in range(self.height):
            source = self.memory.find(self.source + line * self.src_pitch, self.width_in_bytes)
            self.memory.find(self.target + line * self.dst_pitch, self.width_in_bytes)[:] = source


class FakeDriver:
    """The driver's graph functions: work that comes in during a capture is kept, and done at every launch."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.capturing: list[Callable[[], None]] | None = None
        self.kept: dict[int, list[Callable[[], None]]] = {}
        self.launches = self.captures = self.destroyed = self.plain = self.synchronised = 0

    def synchronize(self) -> None:
        assert self.capturing is None
        self.synchronised += 1

    def enqueue(self, work: Callable[[], None]) -> None:
        if self.capturing is None:
            self.plain += 1
            work()
        else:
            self.capturing.append(work)

    def cuStreamBeginCapture_v2(self, stream: ctypes.c_void_p, mode: int) -> int:
        assert self.capturing is None
        self.capturing = []
        return 0

    def cuStreamEndCapture(self, stream: ctypes.c_void_p, graph: Any) -> int:
        assert self.capturing is not None
        self.captures += 1
        self.kept[self.captures], self.capturing = self.capturing, None
        graph._obj.value = self.captures
        return 901 if self.refuses == "capture" else 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: ctypes.c_void_p, flags: ctypes.c_ulonglong) -> int:
        executable._obj.value = graph.value
        return 0

    def cuGraphDestroy(self, graph: ctypes.c_void_p) -> int:
        return 0

    def cuGraphLaunch(self, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        assert executable.value is not None
        self.launches += 1
        for work in self.kept[executable.value]:
            work()
        return 0

    def cuGraphExecDestroy(self, executable: ctypes.c_void_p) -> int:
        assert executable.value is not None
        del self.kept[executable.value]
        self.destroyed += 1
        return 0


class FakeContext:
    """An execution context that runs the graph which the engine would have been built from."""

    def __init__(
        self,
        memory: FakeMemory,
        driver: FakeDriver,
        spec: GraphSpec,
        profiles: list[Bounds],
        session: ort.InferenceSession,
        debug: Collection[str] = (),
    ) -> None:
        self.memory, self.driver, self.spec, self.profiles = memory, driver, spec, profiles
        self.debug, self.shown, self.listener = set(debug), [], None
        self.bounds: Bounds = {}
        self.changes = 0
        self.session = session
        self.shapes = {tensor.name: tensor.shape for tensor in spec.inputs}
        self.addresses: dict[str, int] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        assert len(self.memory.blocks[memory]) == size == FakeEngine.device_memory_size_v2
        self.memory.shared.add(memory)

    def spec_of(self, name: str) -> TensorSpec:
        return next(tensor for tensor in self.spec.inputs if tensor.name == name)

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        self.bounds = self.profiles[profile] if self.profiles else {}

    def set_input_shape(self, name: str, shape: Sequence[int]) -> None:
        self.changes += 1
        smallest, _, largest = self.bounds.get(name, (shape,) * 3)
        assert all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))
        assert all(isinstance(size, str) or size == given
                   for size, given in zip(self.spec_of(name).shape, shape, strict=True))  # fmt: skip
        self.shapes[name] = tuple(shape)

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address % 256 == 0, "TensorRT wants aligned addresses"
        self.changes += 1
        self.addresses[name] = address

    def set_tensor_debug_state(self, name: str, flag: bool) -> bool:
        assert flag and name in self.debug, f"{name} was not marked when the engine was built"
        self.shown.append(name)
        return True

    def set_debug_listener(self, listener: Any) -> bool:
        self.listener = listener
        return True

    def execute_async_v3(self, stream: int) -> bool:
        seen = self.changes

        def work() -> None:
            assert self.changes == seen, "a context must stay as it was captured"
            self.run()

        self.driver.enqueue(work)
        return True

    def run(self) -> None:
        feeds = {
            tensor.name: self.memory.read(self.addresses[tensor.name], self.shapes[tensor.name], tensor.dtype)
            for tensor in self.spec.inputs
        }
        names = [tensor.name for tensor in self.spec.outputs]
        written = {self.addresses[name]: name for name in names}
        assert len(written) == len(names), "two outputs at one place"
        for name in feeds:  # a cache that a layer updates is the one thing that may be read and written
            updated = written.get(self.addresses[name])
            assert updated is None or updated.replace("present", "past") == name
        told = self.session.run([*names, *self.shown], feeds)
        for name, values in zip(names, told, strict=False):
            self.memory.write(self.addresses[name], values)
        for name, values in zip(self.shown, told[len(names) :], strict=True):
            address = self.memory.alloc(values.nbytes)
            self.memory.write(address, values)
            assert self.listener.process_debug_tensor(address, None, values.dtype, values.shape, name, 1)


def literal_options() -> ort.SessionOptions:
    """ONNX Runtime computes Q/DQ as they stand: it fuses none into products of its own, which round otherwise."""
    options = session_options(1)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


class FakeEngine:
    """A deserialized engine, run by one session of ONNX Runtime."""

    device_memory_size_v2 = 4096

    def __init__(
        self,
        memory: FakeMemory,
        driver: FakeDriver,
        path: Path,
        spec: GraphSpec,
        profiles: list[Bounds],
        debug: Collection[str],
    ) -> None:
        options, model = literal_options(), onnx.load(str(path), load_external_data=False)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(debug))
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        session = open_session(path, options, model.SerializeToString())
        self.arguments = (memory, driver, spec, profiles, session, debug)

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "user managed"
        return FakeContext(*self.arguments)


def fake_modules(
    folder: Path,
    manifest: Manifest,
    capability: tuple[int, int],
    refuses: str = "",
    debug: Mapping[str, Collection[str]] | None = None,
) -> Modules:
    """Stand-ins for `tensorrt`, `pycuda.driver` and the driver; the graphs' bytes name the engine.

    debug: by graph, the values that the engines were built to show.
    """
    memory, driver = FakeMemory(), FakeDriver(refuses)
    context = SimpleNamespace(push=lambda: None, pop=lambda: None)
    device = SimpleNamespace(
        retain_primary_context=lambda: context, compute_capability=lambda: capability, name=lambda: "NVIDIA stand-in"
    )
    engines = {
        (folder / spec.file).read_bytes(): (
            folder / spec.file,
            spec,
            [input_shapes(spec, one.sizes) for one in profiles(name, manifest.graphs, manifest.program)],
            (debug or {}).get(name, ()),
        )
        for name, spec in manifest.graphs.items()
    }

    def deserialize(content: mmap.mmap) -> FakeEngine | None:
        assert isinstance(content, mmap.mmap), "the file is mapped, not read"
        return FakeEngine(memory, driver, *engines[bytes(content)]) if bytes(content) in engines else None

    def download(values: np.ndarray, address: int, stream: Any) -> None:
        values[...] = memory.read(address, values.shape, values.dtype.name)

    cuda = SimpleNamespace(
        Device=lambda index: device,
        Stream=lambda: SimpleNamespace(handle=1, synchronize=driver.synchronize),
        mem_alloc=memory.alloc,
        memcpy_htod_async=memory.write,
        memset_d8=memory.fill,
        Memcpy2D=lambda: FakeCopy(memory),
        memcpy_dtoh_async=download,
        memcpy_dtoh=lambda values, address: download(values, address, None),
    )

    class FakeLogger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            self.severity = severity

    runtime = SimpleNamespace(deserialize_cuda_engine=deserialize)
    tensorrt = SimpleNamespace(
        __version__=VERSION,
        Logger=FakeLogger,
        Runtime=lambda logger: runtime,
        IDebugListener=type("IDebugListener", (), {}),
        nptype=lambda dtype: dtype,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    )
    return Modules(tensorrt, cuda, driver)
