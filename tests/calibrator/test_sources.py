"""Calibration states from bags, LIBERO's HDF5 and episode files; what cannot be used is counted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin
from safetensors.numpy import save_file

from calibrator.__main__ import main
from calibrator.data.calibration import collect, load_calibration
from calibrator.data.sources import BagSource, EpisodeSource, Hdf5Layout, Hdf5Source, open_sources
from demo.dataset import encode_png, load_demonstrations
from tests.core import ros_messages as msgs
from tests.core.bags import Message, write_bag
from vla_policy.core.contract import COMPRESSED_IMAGE, IMAGE, JOINT_STATE, STRING, load_contract
from vla_policy.core.errors import ContractError, DataError
from vla_policy.core.left_out import LeftOut

CONTRACT_PATH = Path(__file__).parents[2] / "ros2_ws/src/vla_policy/config/libero.yaml"
CONTRACT = load_contract(CONTRACT_PATH)
CAMERA = "/camera/image_raw/compressed"
START_NS = 1_700_000_000 * 10**9


def episode(task: str, start_ns: int, frames: int, first_picture: int) -> list[Message]:
    messages: list[Message] = [("/instruction", STRING, start_ns, msgs.text(task))]
    for index in range(frames):
        stamp = start_ns + (index + 1) * 50_000_000
        messages.append(("/joint_states", JOINT_STATE, stamp, msgs.joints(stamp, [index, 0, 0, 0.04])))
        image = msgs.compressed(stamp, msgs.picture(first_picture + index))
        messages.append((CAMERA, COMPRESSED_IMAGE, stamp + 1_000_000, image))
    return messages


def two_episodes() -> list[Message]:
    later = START_NS + 60 * 10**9
    return [*episode("open the drawer", START_NS, 6, 0), *episode("push the button", later, 4, 100)]


@pytest.mark.parametrize("storage", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_a_bag_gives_its_episodes(tmp_path: Path, storage: StoragePlugin) -> None:
    bag = write_bag(tmp_path / "bag", two_episodes(), storage)
    source = BagSource(bag, CONTRACT)
    found = source.index()
    assert [(item.length, item.steps) for item in found.trajectories] == [(6, tuple(range(6))), (4, tuple(range(4)))]
    assert not found.left_out
    second = found.trajectories[1].name
    ((name, step, observation),) = source.read({second: frozenset({2})})
    assert (name, step, observation.instruction) == (second, 2, "push the button")
    np.testing.assert_array_equal(observation.image, msgs.picture(102))
    assert observation.state is not None and observation.state[0] == 2


def test_raw_images_are_read_where_the_contract_says_so(tmp_path: Path) -> None:
    messages = [
        (topic, IMAGE, time_ns, msgs.raw(time_ns - 1_000_000, msgs.picture(index)))
        if topic == CAMERA
        else (topic, kind, time_ns, message)
        for index, (topic, kind, time_ns, message) in enumerate(two_episodes())
    ]
    camera = replace(CONTRACT.primary, type=IMAGE)
    contract = replace(CONTRACT, cameras=(camera, *CONTRACT.cameras[1:]))
    source = BagSource(write_bag(tmp_path / "bag", messages), contract)
    first = source.index().trajectories[0].name
    ((_, _, observation),) = source.read({first: frozenset({0})})
    np.testing.assert_array_equal(observation.image, msgs.picture(2))


def test_bad_frames_of_a_bag_are_counted_and_not_chosen(tmp_path: Path) -> None:
    messages = two_episodes()
    broken = next(index for index, item in enumerate(messages) if item[0] == CAMERA and index > 4)
    topic, kind, time_ns, _ = messages[broken]
    stamp = time_ns - 1_000_000
    noise = msgs.make("sensor_msgs/msg/CompressedImage", msgs.header(stamp), "png", np.arange(99, dtype=np.uint8))
    messages[broken] = (topic, kind, time_ns, noise)
    bad_state = next(index for index, item in enumerate(messages) if item[0] == "/joint_states" and index > broken)
    topic, kind, time_ns, _ = messages[bad_state]
    messages[bad_state] = (topic, kind, time_ns, msgs.joints(time_ns, [float("nan"), 0, 0, 0.04]))
    found = BagSource(write_bag(tmp_path / "bag", messages), CONTRACT).index()
    left_out = {(item.where, item.reason): item for item in found.left_out}
    assert left_out[CONTRACT.primary.topic, "undecodable"].count == 1
    refused = left_out["joint_states", "invalid_message"]
    assert refused.count == 1 and "state x is not finite" in refused.example
    assert found.trajectories[0].length == 6 and len(found.trajectories[0].steps) == 5


def test_a_bag_without_the_topics_is_refused(tmp_path: Path) -> None:
    silent = [item for item in two_episodes() if item[0] != CAMERA]
    with pytest.raises(ContractError, match="no topic /camera"):
        BagSource(write_bag(tmp_path / "bag", silent), CONTRACT).index()


def libero_file(path: Path, lengths: tuple[int, ...] = (5, 12), **changes: Any) -> Path:
    """A file of LIBERO's layout; images are upside down there."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "pick up the cup"})
        for number, length in enumerate(lengths):
            images = np.stack([msgs.picture(10 * number + step)[::-1, ::-1] for step in range(length)])
            demo = data.create_group(f"demo_{number}")
            demo["obs/agentview_rgb"] = changes.get("images", images)
            demo["obs/ee_pos"] = changes.get("positions", np.arange(3 * length, dtype=float).reshape(length, 3))
            demo["obs/gripper_states"] = np.full((length, 2), 0.04)
    return path


LAYOUT = Hdf5Layout(state=("obs/ee_pos", "obs/gripper_states"))


def test_libero_demonstrations_are_turned_upright(tmp_path: Path) -> None:
    source = Hdf5Source(libero_file(tmp_path / "task.hdf5"), LAYOUT)
    assert [(item.name, item.length) for item in source.index().trajectories] == [("demo_0", 5), ("demo_1", 12)]
    ((_, step, observation),) = source.read({"demo_1": frozenset({7})})
    np.testing.assert_array_equal(observation.image, msgs.picture(17))
    assert step == 7 and observation.instruction == "pick up the cup" and observation.state is not None
    np.testing.assert_allclose(observation.state, [21, 22, 23, 0.04, 0.04], rtol=1e-6)  # float32


def test_bad_demonstrations_are_counted(tmp_path: Path) -> None:
    positions = np.zeros((5, 3))
    positions[2, 1] = np.inf
    found = Hdf5Source(libero_file(tmp_path / "a.hdf5", (5,), positions=positions), LAYOUT).index()
    assert found.trajectories[0].steps == (0, 1, 3, 4)
    assert found.left_out == (LeftOut("obs/ee_pos", "not finite", 1, "/data/demo_0 step 2"),)
    mixed = Hdf5Source(libero_file(tmp_path / "b.hdf5", (5,), positions=np.zeros((4, 3))), LAYOUT).index()
    assert not mixed.trajectories and [item.reason for item in mixed.left_out] == ["different lengths"]
    assert "obs/ee_pos 4" in mixed.left_out[0].example


def test_one_bad_demonstration_or_file_does_not_refuse_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    folder.mkdir()
    libero_file(folder / "open_the_drawer_demo.hdf5", (4,))
    with h5py.File(libero_file(folder / "push_the_plate_demo.hdf5", (3, 5)), "a") as file:
        del file["data/demo_0/obs"]
        file["data/summary"] = np.zeros(3)
    (folder / "._push_the_plate_demo.hdf5").write_bytes(b"\x00\x05\x16\x07 left by another system")
    found = Hdf5Source(folder, LAYOUT).index()
    assert {item.name: item.length for item in found.trajectories} == {
        "open_the_drawer_demo/demo_0": 4,
        "push_the_plate_demo/demo_1": 5,
    }
    assert {(item.where, item.reason) for item in found.left_out} == {
        ("._push_the_plate_demo.hdf5", "cannot be read"),
        ("obs/agentview_rgb", "missing"),
        ("summary", "wrong type or shape"),
    }


@pytest.mark.parametrize(
    "language",
    ["pick up the cup", "'pick up the cup'", '"pick up the cup"', "pick_up_the_cup", "pick up\u00a0the cup\n",
     ["pick", "up", "the", "cup"], list("pick up the cup")],
)  # fmt: skip
def test_an_instruction_in_every_form_that_was_seen(tmp_path: Path, language: object) -> None:
    path = libero_file(tmp_path / "task.hdf5", (2,))
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": language})
    ((_, _, observation),) = Hdf5Source(path, LAYOUT).read({"demo_0": frozenset({0})})
    assert observation.instruction == "pick up the cup"


NOTHING_TOLD = (None, "null", '{"language_instruction": null}', '{"language_instruction": "None"}', "[]")


@pytest.mark.parametrize("info", NOTHING_TOLD)
def test_an_instruction_that_nobody_tells_is_asked_for(tmp_path: Path, info: str | None) -> None:
    """OpenVLA's regenerated files tell it by their name only; others not at all."""
    for name in ("task.hdf5", "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5"):
        with h5py.File(libero_file(tmp_path / name, (2,)), "a") as file:
            del file["data"].attrs["problem_info"]
            if info is not None:
                file["data"].attrs["problem_info"] = info
    with pytest.raises(DataError, match="give it with --instruction"):
        Hdf5Source(tmp_path / "task.hdf5", LAYOUT).index()
    ((_, _, given),) = Hdf5Source(tmp_path / "task.hdf5", LAYOUT, "stir").read({"demo_0": frozenset({0})})
    assert given.instruction == "stir"
    named = Hdf5Source(tmp_path / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", LAYOUT)
    assert named.index().notes == (
        "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5: instruction 'turn on the stove' by the file's name",
    )


def test_two_cameras_and_openvla_oft_s_state(tmp_path: Path) -> None:
    """What OpenVLA-OFT's LIBERO policies look at: agentview, wrist, hand pose as axis-angle, both fingers."""
    path = libero_file(tmp_path / "task.hdf5", (3,))
    pose = np.arange(18, dtype=float).reshape(3, 6)
    wrist = np.stack([msgs.picture(50 + step)[::-1, ::-1] for step in range(3)])
    with h5py.File(path, "a") as file:
        file["data/demo_0/obs/eye_in_hand_rgb"], file["data/demo_0/obs/ee_states"] = wrist, pose
    layout = Hdf5Layout(("obs/agentview_rgb", "obs/eye_in_hand_rgb"), ("obs/ee_states", "obs/gripper_states"))
    ((_, _, observation),) = Hdf5Source(path, layout).read({"demo_0": frozenset({1})})
    np.testing.assert_array_equal(observation.images[0], msgs.picture(1))
    np.testing.assert_array_equal(observation.images[1], msgs.picture(51))
    assert observation.state is not None
    np.testing.assert_allclose(observation.state, [*pose[1], 0.04, 0.04], rtol=1e-6)  # float32


def test_a_filter_that_fails_costs_its_steps(tmp_path: Path) -> None:
    path = libero_file(tmp_path / "task.hdf5", (6,))
    with h5py.File(path, "a") as file:
        images = file["data/demo_0/obs/agentview_rgb"][:]
        del file["data/demo_0/obs/agentview_rgb"]
        packed = file["data/demo_0/obs"].create_dataset(
            "agentview_rgb", data=images, chunks=(2, *images.shape[1:]), compression="gzip", fletcher32=True
        )
        place = packed.id.get_chunk_info(1).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 4 : place + 12] = bytes(8)
    path.write_bytes(content)
    found = Hdf5Source(path, LAYOUT).index()
    assert found.trajectories[0].steps == (0, 1, 4, 5)
    (left_out,) = found.left_out
    assert (left_out.where, left_out.reason, left_out.count) == ("obs/agentview_rgb", "cannot be read", 2)


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    text = tmp_path / "text.hdf5"
    text.write_text("no")
    with pytest.raises(DataError, match="not a readable HDF5 file"):
        Hdf5Source(text, LAYOUT).index()
    floats = libero_file(tmp_path / "floats.hdf5", (2,), images=np.zeros((2, 8, 8, 3)))
    (left_out,) = Hdf5Source(floats, LAYOUT).index().left_out
    assert left_out.reason == "wrong type or shape" and "float64" in left_out.example
    joints = Hdf5Source(libero_file(tmp_path / "c.hdf5", (2,)), replace(LAYOUT, state=("obs/joints",))).index()
    assert [(item.where, item.reason) for item in joints.left_out] == [("obs/joints", "missing")]
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        file.create_group("episodes")
    with pytest.raises(DataError, match="no group 'data' of demonstrations; it holds episodes"):
        Hdf5Source(tmp_path / "d.hdf5", LAYOUT).index()


def episode_folder(folder: Path, lengths: tuple[int, ...] = (4, 6)) -> Path:
    folder.mkdir()
    for number, length in enumerate(lengths):
        pictures = [encode_png(msgs.picture(10 * number + step)) for step in range(length)]
        tensors = {"png": np.concatenate(pictures), "png_end": np.cumsum([len(one) for one in pictures])}
        tensors["state"] = np.ones((length, 5), np.float32) * number
        instructions = json.dumps(["lift the lid", "turn the dial"])
        save_file(tensors, folder / f"{number:03d}.safetensors", metadata={"instructions": instructions})
    return folder


def test_episode_files_are_read(tmp_path: Path) -> None:
    source = EpisodeSource(episode_folder(tmp_path / "episodes"))
    assert [item.length for item in source.index().trajectories] == [4, 6]
    ((_, _, observation),) = source.read({"001": frozenset({3})})
    np.testing.assert_array_equal(observation.image, msgs.picture(13))
    assert observation.instruction == "lift the lid" and observation.state is not None
    bad = tmp_path / "episodes" / "002.safetensors"
    bad.write_bytes(b"short")
    assert [(item.where, item.reason) for item in source.index().left_out] == [("002.safetensors", "cannot be read")]
    save_file({"picture": np.zeros((2, 4, 4, 3), np.uint8)}, bad)
    (left_out,) = source.index().left_out
    assert "not an episode with png and state" in left_out.example
    tensors = {"png": np.zeros(9, np.uint8), "png_end": np.asarray([9]), "state": np.ones((1, 5), np.float32)}
    save_file(tensors, bad)
    with pytest.raises(DataError, match=r"002\.safetensors: its metadata has no instructions"):
        source.index()
    save_file(tensors, bad, metadata={"instructions": '["lift the lid"]'})
    (left_out,) = source.index().left_out
    assert (left_out.where, left_out.reason) == ("png", "undecodable")


def test_the_demonstrations_of_the_demo_can_be_calibrated_from(tmp_path: Path) -> None:
    """The same pictures, states and instructions as training reads from the same files."""
    folder = Path(__file__).parents[2] / "demo/episodes/metaworld"
    trained = load_demonstrations([folder])
    source = EpisodeSource(folder)
    trajectories = source.index().trajectories
    assert sum(item.length for item in trajectories) == len(trained)
    first, last = trajectories[0], trajectories[-1]
    wanted = {first.name: frozenset({0, 7}), last.name: frozenset({last.length - 1})}
    for (_, _, observation), row in zip(source.read(wanted), (0, 7, len(trained) - 1), strict=True):
        np.testing.assert_array_equal(observation.image, trained.images[row])
        np.testing.assert_array_equal(observation.state, trained.states[row])
        assert observation.instruction == trained.instructions[trained.instruction[trained.own[row]]]


def test_sources_are_told_apart_and_others_refused(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", two_episodes())
    file = libero_file(tmp_path / "task.hdf5")
    episodes = episode_folder(tmp_path / "episodes")
    kinds = [type(item) for item in open_sources([bag, file, episodes], CONTRACT, "", LAYOUT)]
    assert kinds == [BagSource, Hdf5Source, EpisodeSource]
    with pytest.raises(DataError, match="needs --contract"):
        open_sources([bag], None, "", LAYOUT)
    with pytest.raises(DataError, match="no such file or folder"):
        open_sources([tmp_path / "nowhere"], CONTRACT, "", LAYOUT)
    with pytest.raises(DataError, match="neither a rosbag2 folder"):
        open_sources([CONTRACT_PATH], CONTRACT, "", LAYOUT)


def test_collect_command_reports_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag = write_bag(tmp_path / "bag", two_episodes())
    out = tmp_path / "set"
    arguments = ["collect", str(bag), "--contract", str(CONTRACT_PATH), "--out", str(out), "--samples", "5"]
    assert main(arguments) == 0
    assert "2 trajectories; left out: nothing" in capsys.readouterr().out
    loaded = load_calibration(out)
    assert len(loaded) == 5 and loaded.trajectories == 2
    content = json.loads((out / "calibration.json").read_text())
    assert content["sources"][0]["contract_sha256"] == CONTRACT.sha256
    assert main([*arguments[:-1], "99"]) == 2
    assert "the sources hold 10 usable ones" in capsys.readouterr().err
    again = tmp_path / "again"
    collect([BagSource(bag, CONTRACT)], again, 5, seed=0)
    assert load_calibration(again).sha256 == loaded.sha256
