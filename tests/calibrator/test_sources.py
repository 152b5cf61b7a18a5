"""Calibration states from bags and episode files; what cannot be used is counted."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin
from safetensors import safe_open
from safetensors.numpy import save_file

from calibrator.__main__ import main
from calibrator.data.bag import BagSource
from calibrator.data.calibration import collect, load_calibration
from calibrator.data.episodes import EpisodeSource
from calibrator.data.hdf5 import Hdf5Source
from calibrator.data.layout import RecordLayout
from calibrator.data.sources import open_sources
from demo.dataset import encode_png, load_demonstrations
from tests.calibrator.test_hdf5 import LAYOUT, libero_file
from tests.core import ros_messages as msgs
from tests.core.bags import Message, write_bag
from vla_policy.core.contract import COMPRESSED_IMAGE, IMAGE, JOINT_STATE, STRING, load_contract
from vla_policy.core.errors import ContractError, DataError

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
    (record,) = source.read({second: frozenset({2})})
    observation = record.observation
    assert (record.trajectory, record.step, observation.instruction) == (second, 2, "push the button")
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
    (observation,) = (record.observation for record in source.read({first: frozenset({0})}))
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
    invalid, undecodable = sorted(found.left_out, key=lambda item: item.reason)
    assert (invalid.where, invalid.reason, invalid.count) == ("joint_states", "invalid_message", 1)
    assert invalid.example == "joint_states: state x is not finite"
    assert (undecodable.where, undecodable.reason, undecodable.count) == (CAMERA[1:], "undecodable", 1)
    assert "not a whole JPEG or PNG" in undecodable.example
    assert found.trajectories[0].length == 6 and len(found.trajectories[0].steps) == 5


def test_a_bag_without_the_topics_is_refused(tmp_path: Path) -> None:
    silent = [item for item in two_episodes() if item[0] != CAMERA]
    with pytest.raises(ContractError, match="no topic /camera"):
        BagSource(write_bag(tmp_path / "bag", silent), CONTRACT).index()


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
    source = EpisodeSource(episode_folder(tmp_path / "episodes"), RecordLayout())
    assert [item.length for item in source.index().trajectories] == [4, 6]
    (observation,) = (record.observation for record in source.read({"001": frozenset({3})}))
    np.testing.assert_array_equal(observation.image, msgs.picture(13))
    assert observation.instruction == "lift the lid" and observation.state is not None


def test_bad_episode_files_and_pictures_are_left_out(tmp_path: Path) -> None:
    folder = episode_folder(tmp_path / "episodes")
    (folder / "002.safetensors").write_bytes(b"short")
    save_file({"picture": np.zeros((2, 4, 4, 3), np.uint8)}, folder / "003.safetensors")
    pictures = [encode_png(msgs.picture(7)), np.zeros(9, np.uint8)]
    tensors = {"png": np.concatenate(pictures), "png_end": np.cumsum([len(one) for one in pictures])}
    tensors["state"] = np.ones((2, 5), np.float32)
    save_file(tensors, folder / "004.safetensors", metadata={"instructions": '["lift the lid"]'})
    (folder / "._000.safetensors").write_bytes(b"Mac OS X")
    found = EpisodeSource(folder, RecordLayout()).index()
    assert [(item.name, item.length, len(item.steps)) for item in found.trajectories] == [
        ("000", 4, 4),
        ("001", 6, 6),
        ("004", 2, 1),
    ]
    reasons = {item.where: (item.reason, item.count) for item in found.left_out}
    unread = ("cannot be read", 1)
    assert reasons == {
        "002.safetensors": unread,
        "003.safetensors": unread,
        "._000.safetensors": unread,
        "png": ("undecodable", 1),
    }
    (picture,) = (item for item in found.left_out if item.where == "png")
    assert "004.safetensors step 1: " in picture.example and "not a whole JPEG or PNG" in picture.example


def test_an_episode_without_an_instruction_asks_for_one(tmp_path: Path) -> None:
    folder = episode_folder(tmp_path / "episodes", (3,))
    with safe_open(folder / "000.safetensors", framework="numpy") as stream:
        tensors = {name: stream.get_tensor(name) for name in ("png", "png_end", "state")}
    save_file(tensors, folder / "000.safetensors")
    with pytest.raises(DataError, match=r"000\.safetensors: its metadata has no instructions; give .* --instruction"):
        EpisodeSource(folder, RecordLayout()).index()
    told = EpisodeSource(folder, RecordLayout(instruction="turn the dial"))
    assert [item.length for item in told.index().trajectories] == [3]
    (observation,) = (record.observation for record in told.read({"000": frozenset({1})}))
    assert observation.instruction == "turn the dial"


def test_the_demonstrations_of_the_demo_can_be_calibrated_from(tmp_path: Path) -> None:
    """The same pictures, states and instructions as training reads from the same files."""
    folder = Path(__file__).parents[2] / "demo/episodes/metaworld"
    trained = load_demonstrations([folder])
    source = EpisodeSource(folder, RecordLayout())
    trajectories = source.index().trajectories
    assert sum(item.length for item in trajectories) == len(trained)
    first, last = trajectories[0], trajectories[-1]
    wanted = {first.name: frozenset({0, 7}), last.name: frozenset({last.length - 1})}
    for record, row in zip(source.read(wanted), (0, 7, len(trained) - 1), strict=True):
        observation = record.observation
        np.testing.assert_array_equal(record.action, trained.actions[trained.own[row]])
        np.testing.assert_array_equal(observation.image, trained.images[row])
        np.testing.assert_array_equal(observation.state, trained.states[row])
        assert observation.instruction == trained.instructions[trained.instruction[trained.own[row]]]


def test_sources_are_told_apart_and_others_refused(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", two_episodes())
    file = libero_file(tmp_path / "task.hdf5")
    files = libero_file(tmp_path / "tasks/task.hdf5").parent
    episodes = episode_folder(tmp_path / "episodes")
    kinds = [type(item) for item in open_sources([bag], CONTRACT, "", RecordLayout())]
    assert kinds == [BagSource]
    kinds = [type(item) for item in open_sources([file, files], CONTRACT, "", LAYOUT)]
    assert kinds == [Hdf5Source, Hdf5Source]
    assert [type(item) for item in open_sources([episodes], None, "", RecordLayout())] == [EpisodeSource]
    with pytest.raises(DataError, match="needs --contract"):
        open_sources([bag], None, "", RecordLayout())
    with pytest.raises(DataError, match="a bag's cameras, states, rotation and crop are its contract's"):
        open_sources([bag], CONTRACT, "", LAYOUT)
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
    message = capsys.readouterr().err
    assert "the sources hold 10 usable ones" in message and "lower --samples to 10 or add recordings" in message
    again = tmp_path / "again"
    collect([BagSource(bag, CONTRACT)], again, 5, seed=0)
    assert load_calibration(again).sha256 == loaded.sha256


Change = Callable[[str, int, Any], Iterator[tuple[str, Any]]]


def video(kind: str, time_ns: int, message: Any) -> Iterator[tuple[str, Any]]:
    message.format, message.data = "h264", np.zeros(300, np.uint8)
    yield kind, message


def unstamped(kind: str, time_ns: int, message: Any) -> Iterator[tuple[str, Any]]:
    message.header.stamp.sec = message.header.stamp.nanosec = 0
    yield kind, message


def since_boot(kind: str, time_ns: int, message: Any) -> Iterator[tuple[str, Any]]:
    message.header.stamp.sec -= 1_699_999_000
    yield kind, message


def apart(kind: str, time_ns: int, message: Any) -> Iterator[tuple[str, Any]]:
    for part in (slice(3), slice(3, 4)):
        yield kind, msgs.joints(time_ns, message.position[part].tolist(), names=message.name[part])


def sixteen_bit(kind: str, time_ns: int, message: Any) -> Iterator[tuple[str, Any]]:
    depth = np.zeros((8, 8, 2), np.uint8)
    yield IMAGE, msgs.raw(time_ns, depth, "16UC1")


CAUSES: dict[str, tuple[str, Change, str, str, int, str]] = {
    "video": (CAMERA, video, CAMERA[1:], "undecodable", 10, "'h264'"),
    "no stamps": (CAMERA, unstamped, CAMERA[1:], "invalid_message", 10, "header.stamp is 0 ns"),
    "two clocks": (CAMERA, since_boot, CAMERA[1:], "unsynchronised", 10, "s away; do both publishers stamp with"),
    "two publishers": ("/joint_states", apart, "joint_states", "invalid_message", 20, "joint 'gripper' is missing"),
    "depth": (CAMERA, sixteen_bit, CAMERA[1:], "undecodable", 10, "'16UC1'"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_nothing_usable_is_told_by_topic_reason_and_particular(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, change, where, reason, count, particular = CAUSES[name]
    messages: list[Message] = []
    for topic, kind, time_ns, message in two_episodes():
        changes = change(kind, time_ns - 1_000_000, message) if topic == changed else [(kind, message)]
        messages += [(topic, other, time_ns, changed_message) for other, changed_message in changes]
    bag = write_bag(tmp_path / "bag", messages)
    contract = CONTRACT_PATH
    if name == "depth":
        contract = tmp_path / "contract.yaml"
        contract.write_text(CONTRACT_PATH.read_text().replace(COMPRESSED_IMAGE, IMAGE))
    command = ["collect", str(bag), "--contract", str(contract), "--out", str(tmp_path / "set"), "--samples", "4"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    start = (
        f"error: 4 states were asked for, the sources hold 0 usable ones: {bag} left out {where}: {reason} {count} ("
    )
    assert line.startswith(start) and particular in line
    assert "lower --samples" not in line and line.endswith("; mend the first cause, or add recordings")


def test_a_task_that_came_after_the_frames_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = episode("open the drawer", START_NS, 6, 0)
    bag = write_bag(tmp_path / "bag", [*others, (*first[:2], START_NS + 10**10, first[3])])
    command = ["collect", str(bag), "--contract", str(CONTRACT_PATH), "--out", str(tmp_path / "set"), "--samples", "4"]
    assert main(command) == 2
    assert "no_instruction 6 (an image before the task in words; give it with --instruction)" in capsys.readouterr().err
    assert main([*command, "--instruction", "open the drawer"]) == 0
    assert {sample.instruction for sample in load_calibration(tmp_path / "set").samples} == {"open the drawer"}
