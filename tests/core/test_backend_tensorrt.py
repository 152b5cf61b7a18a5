"""The TensorRT runner's bookkeeping, with stand-ins: device memory in NumPy, engines executed by ONNX Runtime."""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
import torch
from fake_gpu import VERSION, FakeEngine, fake_modules
from onnx import TensorProto
from pi05_policy import PI0, tiny_pi05_folder
from ragged import KEY, TOKEN_VOCAB, observation, write_policy
from rounding import assert_clear
from tiny import INSTRUCTIONS, tiny_policy_folder

from calibrator.families import TorchActor
from calibrator.families.loading import open_checkpoint
from engine_build.backends import find_backend
from engine_build.backends.base import Dialect
from engine_build.backends.onnxruntime.linear import linear
from engine_build.build import Policy, export_graphs
from engine_build.families import find_family
from engine_build.weights import layers_of
from vla_policy.core.backends.onnxruntime.session import OnnxRuntimeSession
from vla_policy.core.backends.tensorrt.memory import Memory
from vla_policy.core.backends.tensorrt.session import Modules, TensorRtSession, load_modules
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL
from vla_policy.core.manifest import Manifest, file_records
from vla_policy.core.observation import Decision, Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prismatic.prompt import rows
from vla_policy.core.program import Sequences, Session
from vla_policy.core.runner import Engine

# What float16 does to the outputs of a small policy, of their largest magnitude: some 60 operations in a row round to
# 2^-11 of their results, sqrt(60) / 2048 = 0.004 if that adds up as a random walk. Seen are 0.001 and 0.003.
FLOAT16 = 0.01


FORMS = {"updated": (11, 4, 1), "appended": (10, 3)}
"""Of the cache, and a release of TensorRT that has it."""


@pytest.fixture(scope="module", params=FORMS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A 16-bit policy in a folder with its graphs, and their manifest."""
    folder = tmp_path_factory.mktemp("tensorrt")
    write_policy(folder / "policy")
    return folder, export(folder, FORMS[request.param])


def export(folder: Path, release: tuple[int, ...] = FORMS["updated"]) -> Manifest:
    """Writes the graphs of `folder/policy` as for a release of TensorRT; a manifest like an A100 engine's."""
    return export_as(folder / "policy", folder, find_backend("tensorrt").dialect(release))


def export_as(policy: Path, folder: Path, dialect: Dialect) -> Manifest:
    config = PolicyConfig.load(policy)
    layers = layers_of(config)
    with open_checkpoint(policy, config) as checkpoint:
        source = Policy(config, checkpoint, policy, "0")
        written = export_graphs(folder, source, layers, dict.fromkeys(layers, FULL), dialect)
    graphs, program, files = dict(written.graphs), dict(written.program), file_records(folder)
    return Manifest("a100", "tensorrt_rtx", VERSION, "0", graphs, program, (), files, {"policy": "0"}, config.raw, 0)


def engine_of(folder: Path, manifest: Manifest, modules: Modules, key: str = KEY) -> Engine:
    policy = manifest.config.family.policy(manifest.config, folder / "policy", key)
    return Engine(manifest, TensorRtSession(folder, manifest, modules), policy, key)


@functools.lru_cache(maxsize=1)
def engine_in(folder: Path) -> list[Engine]:
    """One per folder, made by the first test that wants it."""
    return []


def shared_engine(folder: Path, manifest: Manifest) -> Engine:
    if not (kept := engine_in(folder)):
        kept.append(engine_of(folder, manifest, fake_modules(folder, manifest, (8, 0))))
    return kept[0]


@functools.lru_cache(maxsize=1)
def shared_actor(folder: Path) -> TorchActor:
    return TorchActor.load(folder / "policy")


def decide_alike(engine: Engine, actor: TorchActor, seed: int, instruction: str) -> None:
    """Whether both decide the same tokens of a state in which float16 does not decide between two."""
    state = replace(observation(seed), instruction=instruction)
    decided = actor.act(state).tokens
    assert_clear(actor.scores(state, decided), FLOAT16)
    np.testing.assert_array_equal(engine.act(state).tokens, decided)


def test_decisions_equal_the_torch_policy_and_nothing_is_new_to_a_prompt(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    modules = fake_modules(folder, manifest, (8, 0))
    engine, driver = engine_of(folder, manifest, modules), modules.driver
    assert engine.processor == "NVIDIA stand-in"
    actor = TorchActor.load(folder / "policy")
    # When it was opened: the image, prompts of four lengths and a step, each run plainly and then captured.
    ready = (6, 6, 0)
    assert (driver.plain, driver.captures, driver.launches) == ready
    for seed, instruction in ((2, "push"), (4, "lift"), (8, "push the robot"), (11, "push"), (21, "push the " * 20)):
        decide_alike(engine, actor, seed, instruction)
    launches = 5 * (2 + 2)  # image, prompt and two steps of each decision
    assert (driver.plain, driver.captures, driver.launches, driver.destroyed) == (6, 6, launches, 0)


# Of four steps of the prompt's length: their ends, what is one shorter and one longer, and the shortest.
LENGTHS = [2, 3, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128]


def prompt(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, TOKEN_VOCAB, (1, length))


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_of_every_length_are_the_torch_policy_s(exported: tuple[Path, Manifest], length: int) -> None:
    """Of four tokens in a row, each but the first behind a cache that the calls before have left."""
    folder, manifest = exported
    engine, actor = shared_engine(folder, manifest), shared_actor(folder)
    inputs = engine.policy.inputs(observation(length)) | {"input_ids": prompt(length)}
    tokens = np.random.default_rng(length + 1).integers(TOKEN_VOCAB - 256, TOKEN_VOCAB, 4)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        logits = actor.policy.output(tensors, torch.from_numpy(tokens)[None])[0].float().numpy()
    expected = logits[:, TOKEN_VOCAB - 256 : TOKEN_VOCAB]  # the action tokens', which an engine's head has
    found = engine.policy.scores(engine.program(), inputs, Decision(tokens, np.zeros(3)))
    np.testing.assert_allclose(found, expected, atol=FLOAT16 * np.abs(expected).max())


def in_all_forms(policy: Path, folder: Path, key: str) -> Iterator[tuple[Sequences, Engine]]:
    """Engines of the same layers in float32: with sizes that are free, by ONNX Runtime, and with fixed ones."""
    for form in Sequences:
        made = folder / form.value
        made.mkdir()
        manifest = export_as(policy, made, Dialect(TensorProto.FLOAT, linear, sequences=form))
        session: Session
        if form is Sequences.FREE:
            session = OnnxRuntimeSession(made, replace(manifest, backend_version=ort.__version__), 1)
        else:
            session = TensorRtSession(made, manifest, fake_modules(made, manifest, (8, 0)))
        yield form, Engine(manifest, session, manifest.config.family.policy(manifest.config, policy, key), key)


class Case(NamedTuple):
    """A policy, a state of it, how many ids of a prompt at most, and how many words its tokenizer has."""

    write: Callable[[Path], Path]
    key: str
    state: Observation
    longest: int
    words: int


def seen_by(size: int, images: int, state: list[float]) -> Observation:
    image, *further = np.random.default_rng(3).integers(0, 256, (images, size, size, 3), dtype=np.uint8)
    return Observation(image, "push the button", np.asarray(state, np.float32), tuple(further))


CASES = {
    "openvla": Case(write_policy, KEY, observation(3), 128, TOKEN_VOCAB),
    "openvla, two images": Case(lambda folder: write_policy(folder, images=2), KEY,
                                observation(3, 2), 128, TOKEN_VOCAB),
    "openvla_oft": Case(lambda folder: tiny_policy_folder(folder, images=2, chunk=4), "tiny",
                        seen_by(32, 2, [0.3, 0.05]), 128, 60),
    "pi05": Case(lambda folder: tiny_pi05_folder(folder, images=2), "tiny", seen_by(40, 2, [0.3, 0.05]), 200, 570),
    "pi0": Case(lambda folder: tiny_pi05_folder(folder, **PI0), "tiny", seen_by(40, 1, [0.3, 0.05]), 48, 570),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_fixed_sizes_give_what_free_ones_give(case: Case, tmp_path: Path) -> None:
    """To float32: nothing but the order of sums differs, for prompts of every length, whatever filling is."""
    case.write(tmp_path / "policy")
    lengths = [length for length in (*LENGTHS, 55, 56, 57, 104, 152, 153, 200) if length <= case.longest]
    found: dict[Sequences, list[np.ndarray]] = {}
    for form, engine in in_all_forms(tmp_path / "policy", tmp_path, case.key):
        inputs = engine.policy.inputs(case.state)
        for length in lengths:
            ids = np.random.default_rng(length).integers(3, case.words, (1, length))
            decided = engine.policy.decide(engine.program(), inputs | {"input_ids": ids})
            scores = engine.policy.scores(engine.program(), inputs | {"input_ids": ids}, decided)
            found.setdefault(form, []).append(np.concatenate([scores.ravel(), decided.action.ravel()]))
    expected = np.stack(found.pop(Sequences.FREE))
    assert len({row.tobytes() for row in expected}) == len(lengths)
    for form, rows_of_form in found.items():
        np.testing.assert_allclose(rows_of_form, expected, atol=1e-5 * np.abs(expected).max(), err_msg=form.value)


def test_a_handle_holds_until_another_decision_begins(exported: tuple[Path, Manifest]) -> None:
    """A step may be repeated from where it began; what a new prompt has overwritten is refused."""
    folder, manifest = exported
    engine = engine_of(folder, manifest, fake_modules(folder, manifest, (8, 0)))
    inputs, program = engine.policy.inputs(observation(0)), engine.program()
    _, patches = program.run("vision", {"pixel_values": inputs["pixel_values"]})
    whole = {"rows": rows(inputs["input_ids"], engine.config.num_patches)}
    _, cache = program.run("prefill", whole | patches)
    token = {"rows": np.array([[100]])}
    first, after = program.run("step", token | cache)
    second, _ = program.run("step", token | after)
    again, _ = program.run("step", token | cache)
    np.testing.assert_array_equal(again["logits"], first["logits"])
    assert not np.array_equal(second["logits"], first["logits"])
    program.run("prefill", whole | patches)
    with pytest.raises(ArtefactError, match="call step: what past_key_0 is fed with was overwritten by a later call"):
        program.run("step", token | cache)


def test_no_cache_is_copied(exported: tuple[Path, Manifest]) -> None:
    """A step writes the new row of each cache where it belongs, and moves no other byte of it."""
    folder, manifest = exported
    modules = fake_modules(folder, manifest, (8, 0))
    engine = engine_of(folder, manifest, modules)
    memory = modules.cuda.mem_alloc.__self__
    program, inputs = engine.program(), engine.policy.inputs(observation(0))
    _, patches = program.run("vision", {"pixel_values": inputs["pixel_values"]})
    ids = rows(inputs["input_ids"], engine.config.num_patches)
    _, cache = program.run("prefill", {"rows": ids, **patches})
    before = {name: memory.read(kept.address, kept.shape, "float16") for name, kept in cache.items()}
    _, after = program.run("step", {"rows": np.array([[100]]), **cache})
    axis = 1 if manifest.program["step"].appended else 2
    for name, kept in after.items():
        assert (kept.address, kept.rows) == (cache[name].address, ids.shape[1] + 1)
        changed = before[name] != memory.read(kept.address, kept.shape, "float16")
        others = tuple(place for place in range(changed.ndim) if place != axis)
        np.testing.assert_array_equal(np.flatnonzero(changed.any(others)), [ids.shape[1]])


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
    with pytest.raises(ArtefactError, match=r"decide: rows has shape \[1, 500\], .* with rows from 24 to 150;"):
        engine.program().run("decide", {"rows": np.ones((1, 500)), "state": np.zeros((1, 2)), **patches})


def test_what_cannot_be_captured_is_launched_plainly_and_said(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    modules = fake_modules(folder, manifest, (8, 0), refuses="capture")
    engine = engine_of(folder, manifest, modules)
    assert (modules.driver.captures, modules.driver.plain) == (6, 6)
    said = r"NVIDIA stand-in \(no CUDA graphs, launched plainly: CUDA could not end capture \(CUresult 901\)"
    assert re.match(said, engine.processor)
    decide_alike(engine, TorchActor.load(folder / "policy"), 2, "push")
    assert (modules.driver.captures, modules.driver.launches, modules.driver.plain) == (6, 0, 6 + 4)


def test_every_call_is_timed_to_its_end(exported: tuple[Path, Manifest]) -> None:
    """A lap ends when the GPU has finished: that of the image, which gives nothing to wait for, too."""
    folder, manifest = exported
    modules = fake_modules(folder, manifest, (8, 0))
    program = engine_of(folder, manifest, modules).program()
    before = modules.driver.synchronised
    program.run("vision", {"pixel_values": np.zeros((1, 6, 16, 16))})
    assert modules.driver.synchronised == before + 1 and [call for call, _ in program.laps] == ["vision"]


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
    with pytest.raises(ArtefactError, match=r"prefill: rows has shape \[1, 500\], .* with rows from 18 to 144;"):
        program.run("prefill", {"rows": np.ones((1, 500))})
    _, cache = program.run("prefill", {"rows": np.ones((1, 16 + 128))})
    for _ in range(3):  # as many as an action has values
        _, cache = program.run("step", {"rows": np.ones((1, 1)), **cache})
    with pytest.raises(ArtefactError, match=r"call step: 148 rows, the engine's cache was built for 147"):
        program.run("step", {"rows": np.ones((1, 1)), **cache})


def test_an_engine_with_a_growing_cache_is_refused(exported: tuple[Path, Manifest]) -> None:
    _, manifest = exported
    program = find_family(manifest.config).program(manifest.config, Sequences.FREE)
    with pytest.raises(ArtefactError, match=r"program: call prefill leaves the size of rows open; all are fixed here"):
        Memory(manifest.graphs, {"prefill": replace(program["prefill"], carried={})}, lambda size: size)


def test_missing_libraries_are_named() -> None:
    with pytest.raises(ArtefactError, match="an engine for no_such_backend needs no_such_backend and pycuda"):
        load_modules("no_such_backend")
