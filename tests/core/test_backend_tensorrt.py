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
from rounding import assert_clear
from tiny import INSTRUCTIONS, tiny_policy_folder

from calibrator.families import TorchActor
from calibrator.families.loading import open_checkpoint
from engine_build.backends import find_backend
from engine_build.backends.base import Written
from engine_build.backends.tensorrt.builder import Profile, call_shapes
from engine_build.build import Policy, export_graphs
from engine_build.weights import layers_of
from vla_policy.core.backends.onnxruntime.session import open_session, session_options
from vla_policy.core.backends.tensorrt import session as session_module
from vla_policy.core.backends.tensorrt.session import Modules, TensorRtSession, load_modules
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL
from vla_policy.core.manifest import Manifest, file_records
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.program import GraphSpec, profiles
from vla_policy.core.runner import Engine

VERSION = "1.0"
# What float16 does to the outputs of a small policy, of their largest magnitude: some 60 operations in a row round to
# 2^-11 of their results, sqrt(60) / 2048 = 0.004 if that adds up as a random walk. Seen are 0.001 and 0.003.
FLOAT16 = 0.01


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

    def __init__(
        self, memory: FakeMemory, driver: FakeDriver, path: Path, spec: GraphSpec, profiles: list[Profile]
    ) -> None:
        self.memory, self.driver, self.spec, self.profiles = memory, driver, spec, profiles
        self.bounds: Profile = {}
        self.changes = 0
        self.session = open_session(path, session_options(1))
        self.shapes = {tensor.name: tensor.shape for tensor in spec.inputs}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        self.bounds = self.profiles[profile] if self.profiles else {}

    def set_input_shape(self, name: str, shape: Sequence[int]) -> None:
        self.changes += 1
        smallest, _, largest = self.bounds.get(name, (shape,) * 3)
        assert all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))
        self.shapes[name] = tuple(shape)

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        """TensorRT infers it; here the graph is run on zeros."""
        names = [tensor.name for tensor in self.spec.outputs]
        zeros = {tensor.name: np.zeros(self.shapes[tensor.name], tensor.dtype) for tensor in self.spec.inputs}
        return dict(zip(names, self.session.run(names, zeros), strict=True))[name].shape

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
        self, memory: FakeMemory, driver: FakeDriver, path: Path, spec: GraphSpec, profiles: list[Profile]
    ) -> None:
        self.arguments = (memory, driver, path, spec, profiles)

    def create_execution_context(self) -> FakeContext:
        return FakeContext(*self.arguments)


def fake_modules(folder: Path, manifest: Manifest, capability: tuple[int, int], refuses: str = "") -> Modules:
    """Stand-ins for `tensorrt`, `pycuda.driver` and the driver; the graphs' bytes name the engine."""
    memory, driver = FakeMemory(), FakeDriver(refuses)
    context = SimpleNamespace(push=lambda: None, pop=lambda: None)
    device = SimpleNamespace(
        retain_primary_context=lambda: context, compute_capability=lambda: capability, name=lambda: "NVIDIA stand-in"
    )
    written = Written(folder, manifest.graphs, manifest.program, {})
    engines = {
        (folder / spec.file).read_bytes(): (
            folder / spec.file,
            spec,
            [call_shapes(name, call, written) for call in profiles(name, manifest.graphs, manifest.program)],
        )
        for name, spec in manifest.graphs.items()
    }

    def deserialize(content: bytes) -> FakeEngine | None:
        return FakeEngine(memory, driver, *engines[content]) if content in engines else None

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
        policy, backend = Policy(config, checkpoint, folder / "policy", "0"), find_backend("tensorrt_rtx")
        written = export_graphs(folder, policy, layers, dict.fromkeys(layers, FULL), backend)
    graphs, program, files = dict(written.graphs), dict(written.program), file_records(folder)
    return Manifest("a100", "tensorrt_rtx", VERSION, "0", graphs, program, (), files, {"policy": "0"}, config.raw, 0)


def engine_of(folder: Path, manifest: Manifest, modules: Modules, key: str = KEY) -> Engine:
    policy = manifest.config.family.policy(manifest.config, folder / "policy", key)
    return Engine(manifest, TensorRtSession(folder, manifest, modules), policy, key)


def decide_alike(engine: Engine, actor: TorchActor, seed: int, instruction: str) -> None:
    """Whether both decide the same tokens of a state in which float16 does not decide between two."""
    state = replace(observation(seed), instruction=instruction)
    decided = actor.act(state).tokens
    assert_clear(actor.scores(state, decided), FLOAT16)
    np.testing.assert_array_equal(engine.act(state).tokens, decided)


def test_decisions_equal_the_torch_policy_over_several_states(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    modules = fake_modules(folder, manifest, (8, 0))
    engine = engine_of(folder, manifest, modules)
    assert engine.processor == "NVIDIA stand-in"
    actor = TorchActor.load(folder / "policy")
    graphs = []
    # The prompt keeps its length for four decisions, changes, and changes back.
    prompts = ["push", "lift", "push", "lift", "push the robot", "push"]
    for seed, instruction in zip((2, 4, 5, 7, 8, 11), prompts, strict=True):
        decide_alike(engine, actor, seed, instruction)
        graphs.append((modules.driver.captures, modules.driver.launches))
    calls = 2 + 2  # vision, prefill and two steps, each its own graph from its second time on
    # Another prompt has other shapes but the same image; those of the first one are kept.
    assert graphs == [(0, 0), (calls, calls), (calls, 2 * calls), (calls, 3 * calls)] + [
        (calls, 3 * calls + 1),
        (calls, 4 * calls + 1),
    ]
    assert modules.driver.destroyed == 0


def test_contexts_that_were_not_used_for_long_are_given_up(
    exported: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_CONTEXTS", 4)
    folder, manifest = exported
    modules = fake_modules(folder, manifest, (8, 0))
    engine, actor = engine_of(folder, manifest, modules), TorchActor.load(folder / "policy")
    prompts = ["push", "push", "push the robot", "push the robot", "push"]
    for seed, instruction in zip((2, 4, 8, 4, 5), prompts, strict=True):
        decide_alike(engine, actor, seed, instruction)
    # Four graphs of the first prompt, of which the image's was still in use, then three of the second.
    assert (modules.driver.captures, modules.driver.destroyed) == (7, 6)
    assert len(modules.driver.kept) == 1


def test_what_is_kept_is_not_written_while_it_is_read_and_not_read_once_overwritten(
    exported: tuple[Path, Manifest],
) -> None:
    """The stand-in's contexts check the first; a handle that a later call has overwritten is refused."""
    folder, manifest = exported
    engine = engine_of(folder, manifest, fake_modules(folder, manifest, (8, 0)))
    inputs, program = engine.policy.inputs(observation(0)), engine.program()
    _, patches = program.run("vision", {"pixel_values": inputs["pixel_values"]})
    prompt = {"input_ids": inputs["input_ids"]}
    _, cache = program.run("prefill", prompt | patches)
    token = {"input_ids": np.array([[100]])}
    program.run("step", token | cache)
    again, _ = program.run("step", token | cache)  # the first step wrote elsewhere
    _, newer = program.run("prefill", prompt | patches)
    expected, _ = program.run("step", token | newer)
    np.testing.assert_array_equal(again["logits"], expected["logits"])
    with pytest.raises(ArtefactError, match="call step: what past_key_0 is fed with was overwritten by a later call"):
        program.run("step", token | cache)


def test_a_chunk_is_decided_in_one_pass(tmp_path: Path) -> None:
    """OpenVLA-OFT: no cache, the state beside the ids, prompts of changing length."""
    tiny_policy_folder(tmp_path / "policy", images=2, chunk=4)
    manifest = export(tmp_path)
    engine = engine_of(tmp_path, manifest, fake_modules(tmp_path, manifest, (8, 0)), "tiny")
    actor = TorchActor.load(tmp_path / "policy")
    for seed, instruction in enumerate(INSTRUCTIONS):
        image, wrist = np.random.default_rng(seed).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
        state = Observation(image, instruction, np.array([0.3 * seed, 0.05], np.float32), (wrist,))
        expected = actor.act(state).action
        np.testing.assert_allclose(engine.act(state).action, expected, atol=FLOAT16 * np.abs(expected).max())
    _, patches = engine.program().run("vision", {"pixel_values": np.zeros((1, 12, 32, 32))})
    with pytest.raises(
        ArtefactError, match=r"decide: input_ids has shape \[1, 500\], .* ids from 2 to 128;"
    ):
        engine.program().run("decide", {"input_ids": np.ones((1, 500)), "state": np.zeros((1, 2)), **patches})


def test_a_graph_that_cannot_be_captured_is_named(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    engine = engine_of(folder, manifest, fake_modules(folder, manifest, (8, 0), refuses="capture"))
    engine.act(observation(0))
    with pytest.raises(ArtefactError, match=r"CUDA could not end capture \(CUresult 901\)"):
        engine.act(observation(0))


def test_only_the_bytes_that_were_hashed_are_deserialized(tmp_path: Path) -> None:
    """Altered after a check of the folder, or of no known hash: TensorRT never sees them."""
    write_policy(tmp_path / "policy")
    manifest = export(tmp_path)
    modules, decoder = fake_modules(tmp_path, manifest, (8, 0)), tmp_path / "decoder.onnx"
    TensorRtSession(tmp_path, manifest, modules)
    modules.tensorrt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=pytest.fail)
    vision = {"vision.onnx": manifest.files["vision.onnx"]}
    with pytest.raises(ArtefactError, match=r"manifest.json needs 'vision.onnx', of which the manifest has no hash"):
        TensorRtSession(tmp_path, replace(manifest, files={}), modules)
    modules.tensorrt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda content: object())
    with pytest.raises(ArtefactError, match=r"manifest.json needs 'decoder.onnx', of which"):
        TensorRtSession(tmp_path, replace(manifest, files=vision), modules)
    content = decoder.read_bytes()
    decoder.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtefactError, match=r"decoder.onnx: sha256 differs"):
        TensorRtSession(tmp_path, manifest, modules)
    decoder.unlink()
    (tmp_path.parent / "elsewhere.onnx").write_bytes(content)
    decoder.symlink_to(tmp_path.parent / "elsewhere.onnx")
    with pytest.raises(ArtefactError, match=r"decoder.onnx: links to .*elsewhere.onnx, outside its folder"):
        TensorRtSession(tmp_path, manifest, modules)


def test_another_gpu_or_version_is_refused(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    with pytest.raises(ArtefactError, match=r"target a100, compute capability \(8, 0\); this GPU has \(9, 0\)"):
        TensorRtSession(folder, manifest, fake_modules(folder, manifest, (9, 0)))
    other = replace(manifest, backend_version="2.0")
    with pytest.raises(ArtefactError, match=r"built with tensorrt_rtx 2.0, installed is 1.0"):
        TensorRtSession(folder, other, fake_modules(folder, manifest, (8, 0)))


def test_a_sequence_longer_than_the_cache_is_refused(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    program = engine_of(folder, manifest, fake_modules(folder, manifest, (8, 0))).program()
    with pytest.raises(
        ArtefactError, match=r"prefill: input_ids has shape \[1, 500\], expected \[1, 'ids'\] with"
    ):
        program.run("prefill", {"input_ids": np.ones((1, 500))})
    past = {spec.name: spec for spec in manifest.graphs["decoder"].inputs if spec.name.startswith("past_")}
    longest = manifest.program["step"].sizes["past"].largest
    caches = {name: np.zeros((1, spec.shape[1], longest + 1, spec.shape[3])) for name, spec in past.items()}
    with pytest.raises(ArtefactError, match=rf"step: past_key_0 has shape .* past from 1 to {longest}"):
        program.run("step", {"input_ids": np.ones((1, 1)), **caches})


def test_missing_libraries_are_named() -> None:
    with pytest.raises(ArtefactError, match="an engine for no_such_backend needs no_such_backend and pycuda"):
        load_modules("no_such_backend")
