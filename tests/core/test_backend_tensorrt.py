"""The TensorRT runner's bookkeeping, with stand-ins: device memory in NumPy, engines executed by ONNX Runtime."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import VERSION, FakeEngine, fake_modules
from ragged import KEY, observation, write_policy
from rounding import assert_clear
from tiny import INSTRUCTIONS, tiny_policy_folder

from calibrator.families import TorchActor
from calibrator.families.loading import open_checkpoint
from engine_build.backends import find_backend
from engine_build.build import Policy, export_graphs
from engine_build.weights import layers_of
from vla_policy.core.backends.tensorrt import session as session_module
from vla_policy.core.backends.tensorrt.session import Modules, TensorRtSession, load_modules
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL
from vla_policy.core.manifest import Manifest, file_records
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.runner import Engine

# What float16 does to the outputs of a small policy, of their largest magnitude: some 60 operations in a row round to
# 2^-11 of their results, sqrt(60) / 2048 = 0.004 if that adds up as a random walk. Seen are 0.001 and 0.003.
FLOAT16 = 0.01


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


def test_what_cannot_be_captured_is_launched_plainly_and_said(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    modules = fake_modules(folder, manifest, (8, 0), refuses="capture")
    engine = engine_of(folder, manifest, modules)
    first = engine.act(observation(0))
    assert engine.processor == "NVIDIA stand-in"
    for _ in range(2):
        np.testing.assert_array_equal(engine.act(observation(0)).tokens, first.tokens)
    # Each of vision, prefill and two steps was tried once.
    assert (modules.driver.captures, modules.driver.launches) == (4, 0)
    said = r"NVIDIA stand-in \(no CUDA graphs, launched plainly: CUDA could not end capture \(CUresult 901\)"
    assert re.match(said, engine.processor)


def test_all_contexts_compute_in_one_memory(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    modules = fake_modules(folder, manifest, (8, 0))
    engine = engine_of(folder, manifest, modules)
    for instruction in ("push", "push the robot"):
        engine.act(replace(observation(0), instruction=instruction))
    assert len(modules.cuda.mem_alloc.__self__.shared) == 1


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
    modules.tensorrt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda content: FakeEngine)
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
