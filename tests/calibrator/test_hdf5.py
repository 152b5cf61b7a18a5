"""Calibration states from LIBERO's HDF5 files: instructions in every form, cameras, and parts that cannot be used."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from calibrator.__main__ import main
from calibrator.data.calibration import load_calibration
from calibrator.data.hdf5 import Hdf5Source
from calibrator.data.layout import RecordLayout
from calibrator.data.libero import written_instruction
from tests.core import ros_messages as msgs
from vla_policy.core.errors import DataError
from vla_policy.core.left_out import LeftOut

TASK = "pick up the cup"
LAYOUT = RecordLayout(cameras=("obs/agentview_rgb",), state=("obs/ee_pos", "obs/gripper_states"), rotation=(180,))
WORDS = ["--camera", "obs/agentview_rgb", "--rotate", "180"]


def libero_file(path: Path, lengths: tuple[int, ...] = (5, 12), info: Any = None, **changes: Any) -> Path:
    """A file of LIBERO's layout; images are upside down there. changes: of `images`, `positions`, `compression`."""
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": TASK} if info is None else info)
        for number, length in enumerate(lengths):
            images = np.stack([msgs.picture(10 * number + step)[::-1, ::-1] for step in range(length)])
            wrist = np.stack([msgs.picture(1000 + 10 * number + step, 6)[::-1, ::-1] for step in range(length)])
            demo = data.create_group(f"demo_{number}")
            packed = changes.get("compression")
            stored = changes.get("images", images)
            chunks = (1, *stored.shape[1:]) if packed else None
            demo.create_dataset("obs/agentview_rgb", data=stored, compression=packed, chunks=chunks)
            demo["obs/eye_in_hand_rgb"] = wrist
            demo["obs/ee_pos"] = changes.get("positions", np.arange(3 * length, dtype=float).reshape(length, 3))
            demo["obs/ee_states"] = np.arange(6 * length, dtype=float).reshape(length, 6)
            if changes.get("actions"):
                demo["actions"] = np.arange(7 * length, dtype=float).reshape(length, 7)
            demo["obs/gripper_states"] = np.stack([np.full(length, 0.04), np.full(length, -0.04)], 1)
    return path


def test_libero_demonstrations_are_turned_upright(tmp_path: Path) -> None:
    source = Hdf5Source(libero_file(tmp_path / "task.hdf5"), LAYOUT)
    assert [(item.name, item.length) for item in source.index().trajectories] == [("demo_0", 5), ("demo_1", 12)]
    (record,) = source.read({"demo_1": frozenset({7})})
    observation = record.observation
    np.testing.assert_array_equal(observation.image, msgs.picture(17))
    assert record.step == 7 and record.action is None
    assert observation.instruction == "pick up the cup" and observation.state is not None
    np.testing.assert_allclose(observation.state, [21, 22, 23, 0.04, -0.04], rtol=1e-6)  # float32


def test_two_cameras_and_the_eight_values_of_openvla_oft(tmp_path: Path) -> None:
    file, out = libero_file(tmp_path / "pick_up_the_cup_demo.hdf5", info={}, actions=True), tmp_path / "set"
    command = ["collect", str(file), "--out", str(out), "--samples", "6"]
    assert main([*command, "--layout", "regenerated-libero-hdf5"]) == 0
    loaded = load_calibration(out)
    for index, sample in enumerate(loaded.samples):
        number, observation = int(sample.trajectory[-1]), loaded.observation(index)
        agentview, wrist = observation.images
        np.testing.assert_array_equal(agentview, msgs.picture(10 * number + sample.step))
        np.testing.assert_array_equal(wrist, msgs.picture(1000 + 10 * number + sample.step, 6))
        hand = [*range(6 * sample.step, 6 * sample.step + 6)]
        np.testing.assert_allclose(observation.state, [*hand, 0.04, -0.04], rtol=1e-6)  # float32
        assert sample.instruction == "pick up the cup"
    (source,) = json.loads((out / "calibration.json").read_text())["sources"]
    assert source["layout"]["cameras"] == ["obs/agentview_rgb", "obs/eye_in_hand_rgb"]
    assert loaded.actions is not None and set(loaded.grippers) == {"opposite"}
    for sample, action in zip(loaded.samples, loaded.actions, strict=True):
        np.testing.assert_array_equal(action, np.arange(7 * sample.step, 7 * sample.step + 7))
    assert source["notes"] == ["pick_up_the_cup_demo.hdf5: instruction 'pick up the cup' by the file's name"]


@pytest.mark.parametrize(
    ("language", "stem", "expected"),
    [
        ("pick up the cup", "x", (TASK, "problem_info")),
        ("  pick up\u00a0the\tcup\n", "x", (TASK, "problem_info")),
        ('"pick up the cup"', "x", (TASK, "problem_info")),
        ("'\"pick up the cup\"'", "x", (TASK, "problem_info")),
        ("pick_up_the_cup", "x", (TASK, "problem_info")),
        (["pick", "up", "the", "cup"], "x", (TASK, "problem_info")),
        (list(TASK), "x", (TASK, "problem_info")),
        (["pick up", "the cup "], "x", (TASK, "problem_info")),
        (None, "pick_up_the_cup_demo", (TASK, "the file's name")),
        ("", "KITCHEN_SCENE3_pick_up_the_cup_demo", (TASK, "the file's name")),
        ("None", "LIVING_ROOM_SCENE10_pick_up_the_cup_demo", (TASK, "the file's name")),
        (None, "pick_up_the_cup", None),
        (None, "_demo", None),
        ("None", "x", None),
        ("null", "x", None),
        (" \n", "x", None),
        ('""', "x", None),
        (7, "x", None),
        ([], "x", None),
        (["pick", None], "x", None),
        ("['pick', 'up', 'the', 'cup']", "x", None),
        ({"text": TASK}, "x", None),
    ],
)
def test_an_instruction_in_any_form(language: Any, stem: str, expected: tuple[str, str] | None) -> None:
    assert written_instruction(json.dumps({"language_instruction": language}), stem) == expected
    assert written_instruction(json.dumps({"language_instruction": language}).encode(), stem) == expected


@pytest.mark.parametrize("info", [None, "not JSON", json.dumps(["a"]), json.dumps("a"), json.dumps({}), 7, b"\xff"])
def test_what_holds_no_instruction_is_not_one(info: Any) -> None:
    assert written_instruction(info, "x") is None


def test_an_instruction_that_nobody_tells_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = libero_file(tmp_path / "tasks/x.hdf5", info={"language_instruction": None})
    libero_file(tmp_path / "tasks/y.hdf5", info={"language_instruction": "open the drawer"})
    command = ["collect", str(file.parent), "--out", str(tmp_path / "set"), "--samples", "8", *WORDS]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"{file}: neither data's problem_info nor the file's name" in message
    assert "--instruction" in message and "None" not in message
    assert main([*command, "--instruction", " pick up  the cup"]) == 0
    assert "note: x.hdf5: instruction 'pick up the cup' by --instruction" in capsys.readouterr().out
    told = {(item.trajectory.split("/")[0], item.instruction) for item in load_calibration(tmp_path / "set").samples}
    assert told == {("x", TASK), ("y", "open the drawer")}


def test_bad_steps_and_lengths_are_counted(tmp_path: Path) -> None:
    positions = np.zeros((5, 3))
    positions[2, 1] = np.inf
    found = Hdf5Source(libero_file(tmp_path / "a.hdf5", (5,), positions=positions), LAYOUT).index()
    assert found.trajectories[0].steps == (0, 1, 3, 4)
    assert found.left_out == (LeftOut("obs/ee_pos", "not finite", 1, "/data/demo_0 step 2"),)
    (mixed,) = Hdf5Source(libero_file(tmp_path / "b.hdf5", (5,), positions=np.zeros((4, 3))), LAYOUT).index().left_out
    assert (mixed.reason, mixed.count) == ("different lengths", 1)
    assert mixed.example == "demo_0: obs/agentview_rgb 5, obs/ee_pos 4, obs/gripper_states 5"


def damage(path: Path) -> None:
    """Zeroes in the compressed bytes of one image."""
    with h5py.File(path) as file:
        offset = file["data/demo_1/obs/agentview_rgb"].id.get_chunk_info(4).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 10 : offset + 60] = bytes(50)
    path.write_bytes(content)


Change = Callable[[h5py.Group], None]


def drop_observations(data: h5py.Group) -> None:
    del data["demo_1/obs"]


def empty(data: h5py.Group) -> None:
    drop_observations(data)
    data["demo_1/obs/agentview_rgb"] = np.zeros((0, 8, 8, 3), np.uint8)
    data["demo_1/obs/ee_pos"] = data["demo_1/obs/gripper_states"] = np.zeros((0, 3))


def put(key: str, value: Any) -> Change:
    def change(data: h5py.Group) -> None:
        if key in data:
            del data[key]
        data[key] = value

    return change


IMAGE, STATE, GONE = "demo_1/obs/agentview_rgb", "demo_1/obs/ee_pos", h5py.ExternalLink("gone.hdf5", "/x")
BAD_PARTS: dict[str, tuple[Change, str]] = {
    "no observations": (drop_observations, "obs/agentview_rgb: missing 1 (demo_1: it holds nothing)"),
    "no steps": (empty, "obs/agentview_rgb: no steps 1 (demo_1: 0 steps)"),
    "link": (put(IMAGE, GONE), "obs/agentview_rgb: cannot be read 1 (demo_1: a link to /x in gone.hdf5: "),
    "floats": (put(IMAGE, np.zeros((12, 8, 8, 3), np.float32)), "1 (demo_1: float32 [12, 8, 8, 3], expected uint8 "),
    "channels first": (put(IMAGE, np.zeros((12, 3, 8, 8), np.uint8)), "wrong type or shape 1 (demo_1: uint8 [12, 3, 8"),
    "JPEG": (put(IMAGE, np.zeros((12, 900), np.uint8)), "obs/agentview_rgb: wrong type or shape 1 (demo_1: uint8 [12"),
    "texts": (put(STATE, np.array([b"x"] * 12)), "obs/ee_pos: wrong type or shape 1 (demo_1: |S1 [12], expected numb"),
    "one number": (put(STATE, 1.0), "obs/ee_pos: wrong type or shape 1 (demo_1: float64 [], expected numbers [steps]"),
    "no dataset": (put(STATE, h5py.SoftLink("/data/demo_0")), "obs/ee_pos: wrong type or shape 1 (demo_1: it is a gro"),
    "no demonstration": (put("stats", np.zeros(3)), "data: wrong type or shape 1 (stats: it is a dataset)"),
    "linked file": (put("far", GONE), "data: cannot be read 1 (far: a link to /x in gone.hdf5: "),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_one_bad_part_is_left_out_and_the_rest_used(tmp_path: Path, name: str) -> None:
    file = libero_file(tmp_path / "task.hdf5")
    change, expected = BAD_PARTS[name]
    with h5py.File(file, "r+") as content:
        change(content["data"])
    source = Hdf5Source(file, LAYOUT)
    found = source.index()
    whole = {"demo_0": tuple(range(5))}
    if not expected.startswith("data: "):
        assert {item.name: item.steps for item in found.trajectories} == whole
    else:
        assert {item.name: item.steps for item in found.trajectories} == whole | {"demo_1": tuple(range(12))}
    (left_out,) = found.left_out
    assert expected in str(left_out)
    assert len(list(source.read({"demo_0": frozenset({0, 4})}))) == 2


def test_a_damaged_image_is_left_out_and_its_neighbours_used(tmp_path: Path) -> None:
    file = libero_file(tmp_path / "task.hdf5", compression="gzip")
    damage(file)
    source = Hdf5Source(file, LAYOUT)
    found = source.index()
    assert [item.steps for item in found.trajectories] == [tuple(range(5)), (0, 1, 2, 3, *range(5, 12))]
    assert found.left_out == (LeftOut("obs/agentview_rgb", "cannot be read", 1, "/data/demo_1 step 4"),)
    wanted = {item.name: frozenset(item.steps) for item in found.trajectories}
    assert len(list(source.read(wanted))) == 16
    with pytest.raises(DataError, match=r"task\.hdf5: cannot be read any more .*did it change meanwhile"):
        list(source.read({"demo_1": frozenset({4})}))


def test_a_folder_is_used_but_for_what_is_no_hdf5_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = libero_file(tmp_path / "tasks/first.hdf5").parent
    libero_file(folder / "second.hdf5", (4,), {"language_instruction": "open the drawer"})
    (folder / "._first.hdf5").write_bytes(b"\0\x05\x16\7Mac OS X")
    (folder / "cut.hdf5").write_bytes((folder / "first.hdf5").read_bytes()[:3000])
    (folder / "lfs.hdf5").write_text("version https://git-lfs.github.com/spec/v1\n")
    with h5py.File(folder / "aloha.hdf5", "w") as file:
        file["observations/images/cam_high"] = np.zeros((4, 8, 8, 3), np.uint8)
    out = tmp_path / "set"
    assert main(["collect", str(folder), "--out", str(out), "--samples", "21", *WORDS]) == 0
    printed = capsys.readouterr().out
    assert "tasks: 3 trajectories" in printed and printed.count("cannot be read 1 (not a readable HDF5 file") == 3
    assert "aloha.hdf5: missing 1 (no group 'data' of demonstrations; it holds observations)" in printed
    samples = load_calibration(out).samples
    assert {item.trajectory for item in samples} == {"first/demo_0", "first/demo_1", "second/demo_0"}
    assert {item.instruction for item in samples if item.trajectory == "second/demo_0"} == {"open the drawer"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no", "not a readable HDF5 file"), (None, r"no group 'data' of demonstrations; it holds observations")],
)
def test_a_file_that_is_named_must_be_one(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "task.hdf5"
    if content is None:
        with h5py.File(path, "w") as file:
            file["observations/qpos"] = np.zeros(3)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: {message}"):
        Hdf5Source(path, LAYOUT).index()


def test_nothing_usable_says_why_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = libero_file(tmp_path / "task.hdf5", (3, 4))
    command = ["collect", str(file), "--out", str(tmp_path / "set"), "--samples", "2", *WORDS]
    command += ["--state", "obs/joints"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "lower --samples" not in message
    assert "obs/joints: missing 2 (demo_0: it holds agentview_rgb, ee_pos" in message
    assert not (tmp_path / "set").exists()
