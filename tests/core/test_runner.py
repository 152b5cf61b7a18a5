"""Loading and running an engine folder: refusals, determinism, timings."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ragged import build_engine, observation

from vla_policy.core.errors import DataError, VlaError
from vla_policy.core.observation import Observation
from vla_policy.core.runner import load_engine


@pytest.fixture(scope="module")
def engine_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("runner"), ["w4a16_g32", "w8a16_g32"])


def test_decisions_are_deterministic_and_timed(engine_folder: Path) -> None:
    engine = load_engine(engine_folder, threads=1)
    first, timings = engine.decide(observation(1))
    engine.act(observation(2))
    again = engine.act(observation(1))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.action, again.action)
    assert first.tokens.shape == first.action.shape == (3,)
    assert ((first.tokens >= engine.codec.first_token) & (first.tokens <= engine.codec.last_token)).all()
    assert len(timings.decode_ms) == 2
    assert timings.total_ms > timings.prefill_ms > 0


def test_decode_steps_equal_one_longer_prefill(engine_folder: Path) -> None:
    """The cache changes nothing: step by step gives the logits of reading the whole sequence at once."""
    engine = load_engine(engine_folder, threads=1)
    pixels = np.random.default_rng(0).standard_normal((1, 6, 16, 16)).astype(np.float32)
    ids = engine.tokenizer.encode("push", np.zeros(3))
    tokens = np.array([100, 120, 140])
    stepped = engine.action_logits(pixels, ids[None], tokens)
    for count in range(3):
        longer = np.concatenate([ids, tokens[:count]])[None]
        whole = engine.action_logits(pixels, longer, tokens[:1])[0]
        np.testing.assert_allclose(stepped[count], whole, atol=1e-5)


def test_the_image_matters(engine_folder: Path) -> None:
    engine = load_engine(engine_folder, threads=1)
    ids = engine.tokenizer.encode("push", np.zeros(3))[None]
    black, white = (
        engine.action_logits(np.full((1, 6, 16, 16), value, np.float32), ids, np.array([100])) for value in (-2, 2)
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
        ({"schema_version": 99}, "expected kind 'engine' version 2, got kind 'engine' version 99"),
        ({"kind": "plan"}, "got kind 'plan'"),
        ({"target": "toaster"}, "target 'toaster' is unknown"),
        ({"backend": "tensorrt"}, "target cpu runs on onnxruntime, but the engine is for tensorrt"),
        ({"backend_version": "1.2.3"}, "formats were proven with onnxruntime 1.2.3"),
        ({"units": [{}]}, "malformed"),
    ],
)
def test_wrong_manifests_are_refused(changes: dict[str, Any], message: str, copied: Path) -> None:
    edit_manifest(copied, **changes)
    with pytest.raises(VlaError, match=message):
        load_engine(copied)


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
