"""Calibration states from LeRobot data sets that the real lerobot package wrote (see tests/data/lerobot/make.py)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibrator.__main__ import main
from calibrator.data.calibration import load_calibration
from calibrator.data.layout import RecordLayout
from calibrator.data.lerobot import LeRobotSource
from vla_policy.core.errors import DataError

FIXTURES = Path(__file__).parents[1] / "data/lerobot"
CAMERAS = ("observation.images.image", "observation.images.wrist_image")
LAYOUT = RecordLayout(cameras=CAMERAS)
TASKS = {"pick up the cup": 7, "open the drawer": 5, "push the button": 6}
NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "finger_left", "finger_right")


def picture(camera: int, episode: int, step: int) -> np.ndarray:
    """What make.py drew."""
    number = 100 * camera + 20 * episode + step
    image = np.empty((64, 64, 3), np.uint8)
    for block in range(4):
        level = 40 + 50 * (number // 4**block % 4)
        rows, columns = divmod(block, 2)
        image[rows * 32 : rows * 32 + 32, columns * 32 : columns * 32 + 32] = [level, 255 - level, 60 + 30 * block]
    return image


def numbers(episode: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([episode, step])
    return generator.normal(size=8).astype(np.float32), generator.uniform(-1, 1, 7).astype(np.float32)


def copied(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


@pytest.mark.parametrize("name", ["v3_av1", "v3_h264", "v3_images", "v21_av1", "v21_images"])
def test_every_frame_state_action_and_task_is_the_one_that_was_written(name: str) -> None:
    """A step of a level is 50; a lossy codec at these sizes is off by a few, and the edges of blocks by more."""
    source = LeRobotSource(FIXTURES / name, LAYOUT)
    found = source.index()
    assert [(one.name, one.length) for one in found.trajectories] == [
        (f"episode_{number:06d}", length) for number, length in enumerate(TASKS.values())
    ]
    assert found.left_out == ()
    records = list(source.read({one.name: frozenset(one.steps) for one in found.trajectories}))
    assert len(records) == sum(TASKS.values())
    for record in records:
        episode = int(record.trajectory[-1])
        state, action = numbers(episode, record.step)
        np.testing.assert_array_equal(record.observation.state, state)
        np.testing.assert_array_equal(record.action, action)
        assert record.observation.instruction == list(TASKS)[episode]
        for camera, image in enumerate(record.observation.images):
            error = np.abs(image.astype(int) - picture(camera, episode, record.step))
            assert np.median(error) <= (0 if "images" in name else 6)


def test_only_the_frames_of_chosen_states_are_read() -> None:
    source = LeRobotSource(FIXTURES / "v3_h264", LAYOUT)
    source.index()
    wanted = {"episode_000002": frozenset({5, 1}), "episode_000000": frozenset({6})}
    records = list(source.read(wanted))
    assert [(one.trajectory, one.step) for one in records] == [
        ("episode_000000", 6),
        ("episode_000002", 1),
        ("episode_000002", 5),
    ]
    for record in records:
        error = np.abs(record.observation.image.astype(int) - picture(0, int(record.trajectory[-1]), record.step))
        assert np.median(error) <= 6


def test_the_layout_chooses_turns_and_joins(tmp_path: Path) -> None:
    layout = RecordLayout(
        cameras=CAMERAS[::-1],
        state=("observation.state[finger_left, finger_right]", "observation.state[1:3]", "observation.state[0]"),
        rotation=(180, 0),
        colours="bgr",
    )
    source = LeRobotSource(FIXTURES / "v3_images", layout)
    source.index()
    (record,) = source.read({"episode_000001": frozenset({3})})
    state, _ = numbers(1, 3)
    np.testing.assert_array_equal(record.observation.state, state[[6, 7, 1, 2, 0]])
    wrist, outer = record.observation.images
    np.testing.assert_array_equal(wrist, picture(1, 1, 3)[::-1, ::-1, ::-1])
    np.testing.assert_array_equal(outer, picture(0, 1, 3)[..., ::-1])


def test_collect_takes_a_folder_and_what_it_does_not_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = str(FIXTURES / "v21_av1"), tmp_path / "set"
    command = ["collect", folder, "--out", str(out), "--samples", "9"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert f"it holds 2 cameras ({', '.join(CAMERAS)}); name the policy's, in its order, with --camera" in message
    assert main([*command, "--camera", CAMERAS[0], "--state", "observation.state[x,y,z]"]) == 0
    loaded = load_calibration(out)
    assert len(loaded) == 9 and loaded.trajectories == 3 and loaded.actions is not None
    for sample, state, action in zip(loaded.samples, loaded.states, loaded.actions, strict=True):
        expected, acted = numbers(int(sample.trajectory[-1]), sample.step)
        np.testing.assert_array_equal(state, expected[:3])
        np.testing.assert_array_equal(action, acted)
    (source,) = json.loads((out / "calibration.json").read_text())["sources"]
    assert source["kind"] == "lerobot" and source["version"] == "v2.1"
    assert source["layout"]["rotation"] == [0] and source["layout"]["action"] == "action"


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (RecordLayout(), r"v3_h264: it holds 2 cameras \(observation.images.image, .*\); name the policy's"),
        (RecordLayout(cameras=("image",)), r"no camera 'image'; it holds observation.images.image, observation"),
        (RecordLayout(cameras=CAMERAS, state=("state",)), r"no state 'state'; it holds observation.state, action"),
        (RecordLayout(cameras=CAMERAS, action="actions"), r"no action 'actions'; it holds observation.state, action"),
        (RecordLayout(cameras=CAMERAS, rotation=(0, 0, 0)), r"--rotate: 3 values for 2 cameras"),
        (RecordLayout(cameras=CAMERAS, task="task"), r"no task 'task'; it holds none"),
    ],
)
def test_names_that_are_not_there_are_told_with_those_that_are(layout: RecordLayout, message: str) -> None:
    with pytest.raises(DataError, match=message):
        LeRobotSource(FIXTURES / "v3_h264", layout)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("observation.state[elbow]", r"observation.state: no one value 'elbow'; it has 8, named x, y, z, roll"),
        ("observation.state[6:9]", r"no one value '6:9'; it has 8"),
        ("observation.state[2:2]", r"no one value '2:2'"),
        ("observation.state[x", r"state 'observation.state\[x': expected FEATURE or FEATURE\[values\]"),
    ],
)
def test_parts_of_a_state_that_are_not_there(part: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        source = LeRobotSource(FIXTURES / "v3_images", RecordLayout(cameras=CAMERAS, state=(part,)))
        source.index()
        list(source.read({"episode_000000": frozenset({0})}))


def edit_info(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "meta/info.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def other_version(info: dict[str, Any]) -> None:
    info["codebase_version"] = "v4.0"


def other_rate(info: dict[str, Any]) -> None:
    info["features"][CAMERAS[1]]["info"]["video.fps"] = 30


def no_rate(info: dict[str, Any]) -> None:
    del info["fps"]


def no_films(info: dict[str, Any]) -> None:
    info["video_path"] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_version, r"info\.json: codebase_version 'v4\.0' is unknown; known are v3\.0, v2\.1, v2\.0"),
        (other_rate, r"info\.json: observation\.images\.wrist_image has 30 frames per second, the set 10"),
        (no_rate, r"info\.json: 'fps' is missing or malformed"),
        (no_films, r"info\.json: observation\.images\.image is a video, but there is no video_path"),
    ],
)
def test_metadata_that_cannot_be_meant(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tmp_path, "v3_av1")
    edit_info(folder, change)
    with pytest.raises(DataError, match=message):
        LeRobotSource(folder, LAYOUT).index()
    assert main(["collect", str(folder), "--out", str(tmp_path / "set"), "--camera", *CAMERAS]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "episode_000001.parquet: is truncated or damaged"),
        (pointer, "episode_000001.parquet: is a Git LFS pointer, not the file; fetch it with `git lfs pull`"),
        (Path.unlink, "episode_000001.parquet: is missing; the set was not copied whole"),
    ],
)
def test_one_bad_file_leaves_out_its_episode(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    folder = copied(tmp_path, "v21_images")
    damage(folder / "data/chunk-000/episode_000001.parquet")
    source = LeRobotSource(folder, LAYOUT)
    found = source.index()
    assert [one.name for one in found.trajectories] == ["episode_000000", "episode_000002"]
    (item,) = found.left_out
    assert (item.where, item.reason) == ("data/chunk-000/episode_000001.parquet", "cannot be read")
    assert reason in item.example
    assert len(list(source.read({"episode_000002": frozenset({0, 5})}))) == 2


def test_nothing_usable_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(tmp_path, "v3_h264")
    cut(folder / "data/chunk-000/file-000.parquet")
    command = ["collect", str(folder), "--out", str(tmp_path / "set"), "--samples", "4", "--camera", *CAMERAS]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "data/chunk-000/file-000.parquet: cannot be read 3 (" in message
    assert "is truncated or damaged" in message and not (tmp_path / "set").exists()


def test_a_missing_and_a_damaged_film(tmp_path: Path) -> None:
    folder = copied(tmp_path, "v21_av1")
    film = folder / "videos/chunk-000" / CAMERAS[1] / "episode_000001.mp4"
    film.unlink()
    source = LeRobotSource(folder, LAYOUT)
    found = source.index()
    assert len(found.trajectories) == 2
    (item,) = found.left_out
    assert item.reason == "missing video" and item.where.endswith("wrist_image/episode_000001.mp4")
    other = film.with_name("episode_000002.mp4")
    other.write_bytes(b"no film")
    with pytest.raises(DataError, match=r"wrist_image/episode_000002\.mp4: cannot be decoded"):
        list(source.read({"episode_000002": frozenset({0})}))
    shutil.copy(film.with_name("episode_000000.mp4").parents[1] / CAMERAS[0] / "episode_000001.mp4", other)
    with pytest.raises(DataError, match=r"episode_000002\.mp4: no frame at 0\.5000 s, the nearest is at 0\.4000 s"):
        list(source.read({"episode_000002": frozenset({5})}))


def rewritten(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = folder / "data/chunk-000/file-000.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def no_number(table: pa.Table) -> pa.Table:
    rows = table["observation.state"].to_pylist()
    rows[2][3] = float("nan")
    column = pa.array(rows, table.schema.field("observation.state").type)
    return table.set_column(table.schema.get_field_index("observation.state"), "observation.state", column)


def other_order(table: pa.Table) -> pa.Table:
    return table.take([1, 0, *range(2, len(table))])


def other_times(table: pa.Table) -> pa.Table:
    times = pa.array(3 * np.asarray(table["timestamp"]), table.schema.field("timestamp").type)
    return table.set_column(table.schema.get_field_index("timestamp"), "timestamp", times)


def too_few(table: pa.Table) -> pa.Table:
    return table.slice(0, 17)


def other_names(table: pa.Table) -> pa.Table:
    return table.rename_columns([{"action": "actions"}.get(name, name) for name in table.column_names])


def other_tasks(table: pa.Table) -> pa.Table:
    tasks = pa.array([9] * len(table), pa.int64())
    return table.set_column(table.schema.get_field_index("task_index"), "task_index", tasks)


@pytest.mark.parametrize(
    ("change", "usable", "text"),
    [
        (no_number, 17, "observation.state: not finite 1 (episode_000000 step 2)"),
        (other_order, 11, "data/chunk-000/file-000.parquet: rows are not in order 1 (episode_000000)"),
        (other_times, 0, "data/chunk-000/file-000.parquet: timestamps are not 10 per second 3 (episode_000000)"),
        (too_few, 12, "different lengths 1 (episode_000002: meta says 6 rows, the file holds 5)"),
        (other_names, 0, "no column 'action', which meta/info.json names; it holds observation."),
        (other_tasks, 0, "no task in words 3 (episode_000000: task_index 9; give it with --instruction)"),
    ],
)
def test_rows_that_contradict_the_metadata_are_left_out_by_name(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table], usable: int, text: str
) -> None:
    folder = copied(tmp_path, "v3_images")
    rewritten(folder, change)
    found = LeRobotSource(folder, LAYOUT).index()
    assert sum(len(one.steps) for one in found.trajectories) == usable
    (item,) = found.left_out
    assert text in str(item)


def test_a_preset_names_what_the_published_sets_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published set calls its second camera image2."""
    folder = copied(tmp_path, "v3_images")
    path = folder / "data/chunk-000/file-000.parquet"
    text = (folder / "meta/info.json").read_text().replace("wrist_image", "image2")
    (folder / "meta/info.json").write_text(text)
    table = pq.read_table(path)
    pq.write_table(table.rename_columns([name.replace("wrist_image", "image2") for name in table.column_names]), path)
    command = ["collect", str(folder), "--out", str(tmp_path / "set"), "--samples", "6"]
    assert main([*command, "--layout", "lerobot/libero"]) == 0
    loaded = load_calibration(tmp_path / "set")
    assert len(loaded.observation(0).images) == 2 and loaded.states[0] is not None and len(loaded.states[0]) == 8
    assert main([*command, "--layout", "lerobot/cups"]) == 2
    assert "--layout 'lerobot/cups': no such preset; known are lerobot/libero, " in capsys.readouterr().err
    assert main([*command, "--crop-area", "1.5"]) == 2
    assert "--crop-area 1.5: expected a part in (0, 1]" in capsys.readouterr().err
