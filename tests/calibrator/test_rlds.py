"""Calibration states from an RLDS folder that the real tensorflow_datasets wrote (see tests/data/rlds/make.py)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calibrator.__main__ import main
from calibrator.data.calibration import load_calibration
from calibrator.data.layout import PRESETS, RecordLayout
from calibrator.data.rlds import RldsSource
from calibrator.data.sources import open_sources
from vla_policy.core.errors import DataError

FIXTURE = Path(__file__).parents[1] / "data/rlds"
VERSION = FIXTURE / "libero_fixture/1.0.0"
LAYOUT = PRESETS["modified_libero_rlds"]
TASKS = {"pick up the cup": 5, "open the drawer": 7, "push the button": 4}
SHARD = "libero_fixture-train.tfrecord-00000-of-00001"


def picture(camera: int, episode: int, step: int) -> np.ndarray:
    """What make.py drew."""
    return np.random.default_rng([camera, episode, step]).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def numbers(episode: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([episode, step])
    return generator.normal(size=8).astype(np.float32), generator.uniform(-1, 1, 7).astype(np.float32)


def test_every_picture_state_action_and_task_is_the_one_that_was_written() -> None:
    source = RldsSource(VERSION, LAYOUT)
    found = source.index()
    assert sorted(one.length for one in found.trajectories) == sorted(TASKS.values()) and not found.left_out
    records = list(source.read({one.name: frozenset(one.steps) for one in found.trajectories}))
    assert len(records) == sum(TASKS.values())
    for record in records:
        episode = list(TASKS).index(record.observation.instruction)
        state, action = numbers(episode, record.step)
        np.testing.assert_array_equal(record.observation.state, state)
        np.testing.assert_array_equal(record.action, action)
        for camera, image in enumerate(record.observation.images):
            np.testing.assert_array_equal(image, picture(camera, episode, record.step))


def test_collect_finds_the_sets_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "modified_libero_rlds"
    for name in ("libero_goal_no_noops", "libero_object_no_noops"):
        shutil.copytree(VERSION, folder / name / "1.0.0")
    assert len(open_sources([folder], None, "", LAYOUT)) == 2
    command = ["collect", str(folder), "--out", str(tmp_path / "set"), "--samples", "12"]
    assert main([*command, "--layout", "modified_libero_rlds", "--camera", "observation/image"]) == 0
    loaded = load_calibration(tmp_path / "set")
    assert {sample.source for sample in loaded.samples} == {0, 1} and not loaded.further[0]
    assert loaded.actions is not None and set(loaded.grippers) == {"opposite"}
    sources = json.loads((tmp_path / "set/calibration.json").read_text())["sources"]
    assert [one["path"] for one in sources] == ["libero_goal_no_noops/1.0.0", "libero_object_no_noops/1.0.0"]


def cut_in_a_record(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def cut_in_a_header(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\x01\x02\x03")


def damaged_length(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(bytes(content))


def damaged_record(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[12] = 0x0F
    path.write_bytes(bytes(content))


def other_bytes(path: Path) -> None:
    path.write_bytes(b"something else entirely")


@pytest.mark.parametrize(
    ("damage", "left", "reason"),
    [
        (cut_in_a_record, 2, "within a record; copy it again"),
        (cut_in_a_header, 3, "is cut off at byte"),
        (damaged_length, 0, "no TFRecord at byte 0; it is damaged or something else"),
        (damaged_record, 0, "the record at byte 0 is no tf.train.Example"),
        (other_bytes, 0, "no TFRecord at byte 0; it is damaged or something else"),
    ],
)
def test_a_damaged_shard_gives_what_stands_before(
    tmp_path: Path, damage: Callable[[Path], None], left: int, reason: str
) -> None:
    folder = Path(shutil.copytree(VERSION, tmp_path / "1.0.0"))
    damage(folder / SHARD)
    source = RldsSource(folder, LAYOUT)
    found = source.index()
    assert len(found.trajectories) == left
    (item,) = found.left_out
    assert item.reason == "cannot be read" and reason in item.example
    assert len(list(source.read({one.name: frozenset({0}) for one in found.trajectories}))) == left


def test_what_is_missing_or_of_another_kind(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(VERSION, tmp_path / "set/1.0.0"))
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["3", "3"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (item,) = RldsSource(folder, LAYOUT).index().left_out
    assert str(item) == "1.0.0: shards are missing 1 (1 of 2)"
    info["fileFormat"] = "array_record"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"dataset_info\.json: fileFormat 'array_record' is not supported; prepare"):
        RldsSource(folder, LAYOUT)
    (folder / "dataset_info.json").unlink()
    (folder / SHARD).unlink()
    with pytest.raises(DataError, match=r"no \*\.tfrecord\* file beside features\.json; the set was not copied whole"):
        RldsSource(folder, LAYOUT)
    (folder / "features.json").write_text('{"featuresDict": {"features": {"image": {"image": {}}}}}')
    with pytest.raises(DataError, match=r"features\.json: no episodes of steps \('steps'\); expected an RLDS data set"):
        RldsSource(folder, LAYOUT)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (RecordLayout(), r"it holds 2 cameras \(observation/image, observation/wrist_image\); name the policy's"),
        (RecordLayout(cameras=("image",)), r"no camera 'image'; it holds observation/image, observation/wrist_image"),
        (
            RecordLayout(cameras=("observation/image",), state=("state",)),
            r"no state 'state'; it holds action, discount",
        ),
        (RecordLayout(cameras=("observation/image",), task="task"), r"no task 'task'; it holds language_instruction"),
    ],
)
def test_names_that_are_not_there_are_told_with_those_that_are(layout: RecordLayout, message: str) -> None:
    with pytest.raises(DataError, match=message):
        RldsSource(VERSION, layout)
