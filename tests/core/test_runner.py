"""Loading and running an engine folder: refusals, determinism, timings."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ragged import build_engine, observation
from rounding import NETWORK

from engine_build.verify import verify
from vla_policy.core.errors import DataError, VlaError
from vla_policy.core.files import sha256_file
from vla_policy.core.observation import Decision, Observation
from vla_policy.core.runner import load_engine


@pytest.fixture(scope="module")
def engine_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("runner"), ["w4a16_g32", "w8a16_g32"])


def test_decisions_are_deterministic_and_timed(engine_folder: Path) -> None:
    engine = load_engine(engine_folder, threads=1)
    codec = engine.policy.codec
    first, timings = engine.decide(observation(1))
    engine.act(observation(2))
    again = engine.act(observation(1))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.action, again.action)
    assert first.tokens.shape == first.action.shape == (3,)
    assert ((first.tokens >= codec.first_token) & (first.tokens <= codec.last_token)).all()
    assert [call for call, _ in timings.calls] == ["vision", "prefill", "step", "step"]
    parts = [timings.preprocess_ms, *(milliseconds for _, milliseconds in timings.calls)]
    assert min(parts) > 0 and timings.total_ms > sum(parts)


def test_decode_steps_equal_one_longer_prefill(engine_folder: Path) -> None:
    """The cache changes nothing: step by step gives the logits of reading the whole sequence at once."""
    engine = load_engine(engine_folder, threads=1)
    inputs = engine.policy.inputs(observation())
    tokens = np.array([100, 120, 140])
    decided = Decision(tokens, np.zeros(3))
    stepped = engine.policy.scores(engine.program(), inputs, decided)
    for count in range(3):
        longer = np.concatenate([inputs["input_ids"], tokens[None, :count]], axis=1)
        whole = engine.policy.scores(engine.program(), inputs | {"input_ids": longer}, decided)[0]
        np.testing.assert_allclose(stepped[count], whole, atol=NETWORK * np.abs(whole).max())


def test_the_image_matters(engine_folder: Path) -> None:
    engine = load_engine(engine_folder, threads=1)
    inputs = engine.policy.inputs(observation())
    black, white = (
        engine.policy.scores(
            engine.program(),
            inputs | {"pixel_values": np.full((1, 6, 16, 16), value, np.float32)},
            Decision(np.array([100]), np.zeros(3)),
        )
        for value in (-2, 2)
    )
    assert np.abs(black - white).max() > 0.05


@pytest.fixture
def copied(engine_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine_folder, tmp_path / "engine"))


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_truncated_and_altered_files_are_refused(copied: Path) -> None:
    data = copied / "decoder.data"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    with pytest.raises(VlaError, match=r"decoder.data: \d+ bytes, expected \d+; truncated"):
        load_engine(copied)
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(VlaError, match=r"decoder.data: sha256 differs"):
        load_engine(copied)
    data.unlink()
    with pytest.raises(VlaError, match=r"decoder.data: missing"):
        load_engine(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "expected kind 'engine' version 4, got kind 'engine' version 99"),
        ({"kind": "plan"}, "got kind 'plan'"),
        ({"target": "toaster"}, "target 'toaster' is unknown"),
        ({"backend": "tensorrt"}, "target cpu runs on onnxruntime or .*, but the engine is for tensorrt"),
        ({"backend_version": "1.2.3"}, "onnxruntime 1.2.3, .* engine_build build --target cpu --backend onnxruntime "),
        ({"units": [{}]}, "malformed"),
    ],
)
def test_wrong_manifests_are_refused(changes: dict[str, Any], message: str, copied: Path) -> None:
    edit_manifest(copied, **changes)
    with pytest.raises(VlaError, match=message):
        load_engine(copied)


def outside(folder: Path, name: str) -> Path:
    """`name` of the engine moved beside the folder."""
    evil = folder.parent / "evil"
    evil.mkdir(exist_ok=True)
    shutil.move(folder / name, evil / name)
    return evil / name


@pytest.mark.parametrize("form", ["../evil/decoder.onnx", "{absolute}", "link"])
@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.data", "tokenizer.json"])
def test_nothing_outside_the_folder_is_loaded(form: str, name: str, copied: Path) -> None:
    """Every hash fits; only the place is wrong."""
    evil, manifest = outside(copied, name), json.loads((copied / "manifest.json").read_text())
    if form == "link":
        (copied / name).symlink_to(evil)
        message = rf"{name}: links to {evil}, outside its folder"
    else:
        given = str(evil) if form == "{absolute}" else f"../evil/{name}"
        manifest["files"][given] = manifest["files"].pop(name)
        if name == "decoder.onnx":
            manifest["graphs"]["decoder"]["file"] = given
        edit_manifest(copied, **manifest)
        message = f"an artefact names the file '{given}'; expected a plain name in this folder"
    with pytest.raises(VlaError, match=message):
        load_engine(copied)


@pytest.mark.parametrize(
    ("name", "by"),
    [("vision.onnx", "manifest.json"), ("tokenizer.json", "manifest.json"), ("vision.data", "vision.onnx")],
)
def test_nothing_without_a_hash_is_loaded(name: str, by: str, copied: Path) -> None:
    files = json.loads((copied / "manifest.json").read_text())["files"]
    edit_manifest(copied, files={key: record for key, record in files.items() if key != name})
    with pytest.raises(VlaError, match=f"{by} needs '{name}', of which the manifest has no hash; build"):
        load_engine(copied)


@pytest.mark.parametrize("location", ["../evil/decoder.data", "other.data"])
def test_a_graph_reads_no_data_but_the_engine_s(location: str, copied: Path) -> None:
    """The graph's own hash is right: whoever wrote it also wrote the manifest."""
    (copied / "other.data").write_bytes((copied / "decoder.data").read_bytes())
    (copied.parent / "evil").mkdir()
    shutil.copyfile(copied / "decoder.data", copied.parent / "evil/decoder.data")
    model = onnx.load(str(copied / "decoder.onnx"), load_external_data=False)
    for tensor in model.graph.initializer[:9]:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    (copied / "decoder.onnx").write_bytes(model.SerializeToString())
    files = json.loads((copied / "manifest.json").read_text())["files"]
    record = {"sha256": sha256_file(copied / "decoder.onnx"), "bytes": (copied / "decoder.onnx").stat().st_size}
    edit_manifest(copied, files=files | {"decoder.onnx": record})
    with pytest.raises(VlaError, match=f"decoder.onnx needs '{location}', of which the manifest has no hash"):
        load_engine(copied)
    with pytest.raises(VlaError, match=f"decoder.onnx needs '{location}'"):
        verify(copied, copied.parent / "policy", None)


def test_a_folder_without_manifest_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(VlaError, match=r"manifest.json: no such file; expected an engine folder"):
        load_engine(tmp_path)


def test_unknown_statistics_are_refused(engine_folder: Path) -> None:
    with pytest.raises(VlaError, match="unnorm_key 'other' is not in the policy's norm_stats; choose one of: ragged"):
        load_engine(engine_folder, unnorm_key="other")


def test_unusable_observations_are_refused(engine_folder: Path) -> None:
    engine = load_engine(engine_folder, threads=1)
    seen = observation()
    with pytest.raises(DataError, match="expected uint8 RGB"):
        engine.act(Observation(seen.image.astype(np.float32), seen.instruction, seen.state))
    with pytest.raises(DataError, match="state: expected 3 finite values"):
        engine.act(Observation(seen.image, seen.instruction, None))
