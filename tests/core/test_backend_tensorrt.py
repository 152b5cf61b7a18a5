"""The TensorRT runner's bookkeeping, with stand-ins: device memory in NumPy, engines executed by ONNX Runtime."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ragged import KEY, observation, write_policy
from tiny import INSTRUCTIONS, tiny_policy_folder

from calibrator.families import TorchActor
from engine_build.backends.tensorrt import decoder_profiles
from engine_build.build import Policy, export_graphs
from engine_build.weights import layers_of, open_checkpoint
from vla_policy.core.backends.onnxruntime import open_session, session_options
from vla_policy.core.backends.tensorrt import Modules, TensorRtBackend, load_modules
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL
from vla_policy.core.manifest import GraphSpec, Manifest, file_records
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prompt import PromptTokenizer
from vla_policy.core.runner import Engine

VERSION = "1.0"


class FakeMemory:
    """Device memory: arrays by address."""

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}

    def alloc(self, size: int) -> int:
        address = 1000 * (len(self.blocks) + 1)
        self.blocks[address] = np.zeros(size, np.uint8)
        return address

    def write(self, address: int, values: np.ndarray, stream: Any = None) -> None:
        content = np.frombuffer(values.tobytes(), np.uint8)
        assert len(content) <= len(self.blocks[address]), "written past the end of a buffer"
        self.blocks[address][: len(content)] = content

    def read(self, address: int, shape: Sequence[int], dtype: str) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert size <= len(self.blocks[address]), "read past the end of a buffer"
        return np.frombuffer(self.blocks[address][:size].tobytes(), dtype).reshape(shape)


class FakeDriver:
    """The driver's graph functions: work that comes in during a capture is kept, and done at every launch."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.capturing: list[Callable[[], None]] | None = None
        self.kept: dict[int, list[Callable[[], None]]] = {}
        self.launches = self.captures = self.destroyed = 0

    def enqueue(self, work: Callable[[], None]) -> None:
        if self.capturing is None:
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

    def __init__(self, memory: FakeMemory, driver: FakeDriver, path: Path, spec: GraphSpec) -> None:
        self.memory, self.driver, self.spec = memory, driver, spec
        self.changes = 0
        self.session = open_session(path, session_options(1))
        self.shapes = {tensor.name: tensor.shape for tensor in spec.inputs}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        self.profile = profile

    def set_input_shape(self, name: str, shape: Sequence[int]) -> None:
        self.changes += 1
        self.shapes[name] = tuple(shape)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.changes += 1
        self.addresses[name] = address

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
        read = {self.addresses[name] for name in feeds if feeds[name].size}
        assert not read & {self.addresses[name] for name in names}, "a run must not write what it reads"
        for name, values in zip(names, self.session.run(names, feeds), strict=True):
            self.memory.write(self.addresses[name], values)


class FakeEngine:
    """A deserialized engine."""

    def __init__(
        self, memory: FakeMemory, driver: FakeDriver, path: Path, spec: GraphSpec, config: PolicyConfig
    ) -> None:
        self.arguments = (memory, driver, path, spec)
        self.profiles = decoder_profiles(spec, config) if spec.file.startswith("decoder") else []

    def create_execution_context(self) -> FakeContext:
        return FakeContext(*self.arguments)

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self.profiles[profile][name]


def fake_modules(folder: Path, manifest: Manifest, capability: tuple[int, int], refuses: str = "") -> Modules:
    """Stand-ins for `tensorrt`, `pycuda.driver` and the driver; the graphs' bytes name the engine."""
    memory, driver = FakeMemory(), FakeDriver(refuses)
    context = SimpleNamespace(push=lambda: None, pop=lambda: None)
    device = SimpleNamespace(retain_primary_context=lambda: context, compute_capability=lambda: capability)
    engines = {(folder / spec.file).read_bytes(): (folder / spec.file, spec) for spec in manifest.graphs.values()}

    def deserialize(content: bytes) -> FakeEngine | None:
        return FakeEngine(memory, driver, *engines[content], manifest.config) if content in engines else None

    def download(values: np.ndarray, address: int, stream: Any) -> None:
        values[...] = memory.read(address, values.shape, values.dtype.name)

    cuda = SimpleNamespace(
        Device=lambda index: device,
        Stream=lambda: SimpleNamespace(handle=1, synchronize=lambda: None),
        mem_alloc=memory.alloc,
        memcpy_htod_async=memory.write,
        memcpy_dtoh_async=download,
    )

    class FakeLogger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            self.severity = severity

    runtime = SimpleNamespace(deserialize_cuda_engine=deserialize)
    tensorrt = SimpleNamespace(__version__=VERSION, Logger=FakeLogger, Runtime=lambda logger: runtime)
    return Modules(tensorrt, cuda, driver)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A 16-bit policy in a folder with its graphs, and their manifest."""
    folder = tmp_path_factory.mktemp("tensorrt")
    write_policy(folder / "policy")
    return folder, export(folder)


def export(folder: Path) -> Manifest:
    """Writes the graphs of `folder/policy` in TensorRT's dialect; the manifest that an A100 engine would have."""
    config = PolicyConfig.load(folder / "policy")
    layers = layers_of(config)
    with open_checkpoint(folder / "policy", config) as checkpoint:
        policy = Policy(config, checkpoint, folder / "policy" / "tokenizer.json", "0")
        graphs = export_graphs(folder, policy, layers, dict.fromkeys(layers, FULL), "tensorrt_rtx")
    files = file_records(folder)
    return Manifest("a100", "tensorrt_rtx", VERSION, "0", graphs, (), files, {"policy": "0"}, config.raw, 0)


def test_decisions_equal_the_torch_policy_over_several_states(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    modules = fake_modules(folder, manifest, (8, 0))
    backend, config = TensorRtBackend(folder, manifest, modules), manifest.config
    engine = Engine(manifest, backend, PromptTokenizer(folder / "policy", config), KEY)
    actor = TorchActor.load(folder / "policy")
    steps = engine.codec.dim - 1
    graphs = []
    # The prompt keeps its length for four decisions, changes, and changes back.
    for seed, instruction in enumerate(["push", "lift", "push", "lift", "push the robot", "push"]):
        state = replace(observation(seed), instruction=instruction)
        np.testing.assert_array_equal(engine.act(state).tokens, actor.act(state).tokens)
        graphs.append((modules.driver.captures, modules.driver.launches, modules.driver.destroyed))
    plain, captured = (0, 0, 0), (steps, steps, 0)
    changed = (steps, 3 * steps, steps)
    assert graphs == [plain, captured, (steps, 2 * steps, 0), (steps, 3 * steps, 0), changed, changed]


def test_a_chunk_is_decided_in_one_pass(tmp_path: Path) -> None:
    """OpenVLA-OFT: no cache, the state beside the ids, prompts of changing length."""
    tiny_policy_folder(tmp_path / "policy", images=2, chunk=4)
    manifest = export(tmp_path)
    backend = TensorRtBackend(tmp_path, manifest, fake_modules(tmp_path, manifest, (8, 0)))
    engine = Engine(manifest, backend, PromptTokenizer(tmp_path / "policy", manifest.config), "tiny")
    actor = TorchActor.load(tmp_path / "policy")
    for seed, instruction in enumerate(INSTRUCTIONS):
        image, wrist = np.random.default_rng(seed).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
        state = Observation(image, instruction, np.array([0.3 * seed, 0.05], np.float32), (wrist,))
        expected = actor.act(state).action
        np.testing.assert_allclose(engine.act(state).action, expected, atol=0.02 * np.abs(expected).max())
    with pytest.raises(ArtefactError, match="shorten the instruction"):
        backend.prefill(np.ones((1, 500), np.int64), 0, np.zeros((1, 2), np.float32))


def test_a_graph_that_cannot_be_captured_is_named(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    backend = TensorRtBackend(folder, manifest, fake_modules(folder, manifest, (8, 0), refuses="capture"))
    config = manifest.config
    engine = Engine(manifest, backend, PromptTokenizer(folder / "policy", config), KEY)
    engine.act(observation(0))
    with pytest.raises(ArtefactError, match=r"CUDA could not end capture \(CUresult 901\)"):
        engine.act(observation(0))


def test_only_the_bytes_that_were_hashed_are_deserialized(tmp_path: Path) -> None:
    """Altered after a check of the folder, or of no known hash: TensorRT never sees them."""
    write_policy(tmp_path / "policy")
    manifest = export(tmp_path)
    modules, decoder = fake_modules(tmp_path, manifest, (8, 0)), tmp_path / "decoder.onnx"
    TensorRtBackend(tmp_path, manifest, modules)
    modules.tensorrt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=pytest.fail)
    vision = {"vision.onnx": manifest.files["vision.onnx"]}
    with pytest.raises(ArtefactError, match=r"manifest.json needs 'vision.onnx', of which the manifest has no hash"):
        TensorRtBackend(tmp_path, replace(manifest, files={}), modules)
    modules.tensorrt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda content: object())
    with pytest.raises(ArtefactError, match=r"manifest.json needs 'decoder.onnx', of which"):
        TensorRtBackend(tmp_path, replace(manifest, files=vision), modules)
    content = decoder.read_bytes()
    decoder.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtefactError, match=r"decoder.onnx: sha256 differs"):
        TensorRtBackend(tmp_path, manifest, modules)
    decoder.unlink()
    (tmp_path.parent / "elsewhere.onnx").write_bytes(content)
    decoder.symlink_to(tmp_path.parent / "elsewhere.onnx")
    with pytest.raises(ArtefactError, match=r"decoder.onnx: links to .*elsewhere.onnx, outside its folder"):
        TensorRtBackend(tmp_path, manifest, modules)


def test_another_gpu_or_version_is_refused(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    with pytest.raises(ArtefactError, match=r"target a100, compute capability \(8, 0\); this GPU has \(9, 0\)"):
        TensorRtBackend(folder, manifest, fake_modules(folder, manifest, (9, 0)))
    other = replace(manifest, backend_version="2.0")
    with pytest.raises(ArtefactError, match=r"built with tensorrt_rtx 2.0, installed is 1.0"):
        TensorRtBackend(folder, other, fake_modules(folder, manifest, (8, 0)))


def test_a_sequence_longer_than_the_cache_is_refused(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    backend = TensorRtBackend(folder, manifest, fake_modules(folder, manifest, (8, 0)))
    with pytest.raises(ArtefactError, match=r"take 516 places, the engine's cache has \d+; shorten the instruction"):
        backend.prefill(np.ones((1, 500), np.int64), 0)


def test_missing_libraries_are_named() -> None:
    with pytest.raises(ArtefactError, match="an engine for no_such_backend needs no_such_backend and pycuda"):
        load_modules("no_such_backend")
