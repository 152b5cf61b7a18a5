"""Bags as they are found: what metadata.yaml says otherwise, other recorders' files, and what no contract names."""

import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rosbags.rosbag2 import StoragePlugin

from calibrator.__main__ import main
from tests.core.bags import write_bag
from tests.core.mcap_writer import McapText, message
from tests.core.packed_bags import CAMERA, DATA, KINDS, packed_bag, read, records_of
from tests.core.test_bag import CONTRACT, START_NS, recording
from vla_policy.core.bag import open_bag, read_frames
from vla_policy.core.contract import JOINT_STATE, STRING
from vla_policy.core.errors import ContractError
from vla_policy.core.synchroniser import DropReason, Frame

QOS = {
    "history": "keep_last",
    "depth": 10,
    "reliability": "reliable",
    "durability": "volatile",
    "deadline": {"sec": 0, "nsec": 0},
    "lifespan": {"sec": 0, "nsec": 0},
    "liveliness": "automatic",
    "liveliness_lease_duration": {"sec": 0, "nsec": 0},
    "avoid_ros_namespace_conventions": False,
}


def edited(bag: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = bag / "metadata.yaml"
    content = yaml.safe_load(path.read_text())
    change(content["rosbag2_bagfile_information"])
    path.write_text(yaml.safe_dump(content))
    return bag


def other_qos(content: dict[str, Any]) -> None:
    for item in content["topics_with_message_count"]:
        item["topic_metadata"]["offered_qos_profiles"] = [QOS]


def no_qos(content: dict[str, Any]) -> None:
    for item in content["topics_with_message_count"]:
        item["topic_metadata"]["offered_qos_profiles"] = "[:"


def in_a_folder(content: dict[str, Any]) -> None:
    content["relative_file_paths"] = [f"somewhere/{name}" for name in content["relative_file_paths"]]


def of_absolute_paths(content: dict[str, Any]) -> None:
    content["relative_file_paths"] = [f"/home/robot/{name}.zstd" for name in content["relative_file_paths"]]


def fewer(content: dict[str, Any]) -> None:
    for item in content["topics_with_message_count"]:
        item["message_count"] = 0


@pytest.mark.parametrize("storage", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
@pytest.mark.parametrize("change", [other_qos, no_qos, in_a_folder, of_absolute_paths, fewer])
def test_what_the_files_hold_is_read_whatever_metadata_says(
    tmp_path: Path, storage: StoragePlugin, change: Callable[[dict[str, Any]], None]
) -> None:
    bag = edited(write_bag(tmp_path / "bag", recording(), storage), change)
    assert read(bag) == (5, Counter())


@pytest.mark.parametrize(
    ("mode", "storage"),
    [
        ("FILE", StoragePlugin.MCAP),
        ("FILE", StoragePlugin.SQLITE3),
        ("MESSAGE", StoragePlugin.MCAP),
        ("MESSAGE", StoragePlugin.SQLITE3),
        ("STORAGE", StoragePlugin.MCAP),
    ],
)
def test_compressed_bags_are_read_as_folders_and_as_files(tmp_path: Path, mode: str, storage: StoragePlugin) -> None:
    bag = packed_bag(tmp_path / "bag", mode, storage)
    assert read(bag) == (5, Counter())
    (file,) = bag.glob("bag.*")
    assert read(file) == (5, Counter())


def test_a_file_that_was_unpacked_beside_its_packed_copy_counts_once(tmp_path: Path) -> None:
    bag = packed_bag(tmp_path / "bag", "FILE")
    plain = write_bag(tmp_path / "plain", recording())
    shutil.copy(plain / "plain.mcap", bag / "bag.mcap")
    assert read(bag) == (5, Counter())


def split_bag(path: Path) -> Path:
    """Two files, one after another."""
    first, second = recording()[:7], recording()[7:]
    bag = write_bag(path, first)
    (bag / f"{path.name}.mcap").rename(bag / "bag_0.mcap")
    other = write_bag(path.with_name("other"), second)
    (other / "other.mcap").rename(bag / "bag_1.mcap")

    def whole(content: dict[str, Any]) -> None:
        content["relative_file_paths"] = ["bag_0.mcap", "bag_1.mcap"]
        counts = Counter(topic for topic, _, _, _ in recording())
        for item in content["topics_with_message_count"]:
            item["message_count"] = counts[item["topic_metadata"]["name"]]

    return edited(bag, whole)


def test_a_split_bag_is_one(tmp_path: Path) -> None:
    assert read(split_bag(tmp_path / "bag")) == (5, Counter())


def test_files_that_metadata_does_not_name_are_read(tmp_path: Path) -> None:
    bag = edited(split_bag(tmp_path / "bag"), lambda content: content.update(relative_file_paths=["bag_0.mcap"]))
    (bag / "._bag_0.mcap").write_bytes(b"Mac OS X")
    assert read(bag) == (5, Counter())
    (bag / "bag_0.mcap").rename(bag / "renamed.mcap")
    assert read(bag)[0] == 5


def test_what_metadata_counts_and_no_file_holds_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag = split_bag(tmp_path / "bag")
    (bag / "bag_1.mcap").unlink()
    missing = DropReason.NOT_IN_THE_BAG
    topics = {"metadata.yaml": 1, "joint_states": 2, CAMERA[1:]: 2}
    assert read(bag) == (3, Counter({(topic, missing): count for topic, count in topics.items()}))
    command = ["collect", str(bag), "--contract", CONTRACT.path, "--out", str(tmp_path / "set"), "--samples", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "metadata.yaml: not_in_the_bag 1 (metadata.yaml names bag_1.mcap, which is not there)" in printed
    assert "joint_states: not_in_the_bag 2 (metadata.yaml counts 5 messages, the files hold 3)" in printed
    (source,) = json.loads((tmp_path / "set/calibration.json").read_text())["sources"]
    assert {item["where"]: item["count"] for item in source["left_out"]} == topics


def test_an_instruction_that_only_metadata_knows_is_named(tmp_path: Path) -> None:
    bag = split_bag(tmp_path / "bag")
    (bag / "bag_0.mcap").unlink()
    with pytest.raises(
        ContractError, match=r"no topic /instruction \(although metadata\.yaml counts 1 messages on it\)"
    ):
        read(bag)
    frames = [item for item in read_frames(bag, CONTRACT, instruction="open") if isinstance(item, Frame)]
    assert [frame.instruction for frame in frames] == ["open", "open"]


@pytest.mark.parametrize("text", ["", "a: [", "rosbag2_bagfile_information: 3", "rosbag2_bagfile_information: {}"])
def test_metadata_that_cannot_be_read_is_said_and_the_files_are_read(tmp_path: Path, text: str) -> None:
    bag = write_bag(tmp_path / "bag", recording())
    (bag / "metadata.yaml").write_text(text)
    assert read(bag) == (5, Counter({("metadata.yaml", DropReason.NOT_IN_THE_BAG): 1}))


def test_the_instruction_that_is_given_holds_until_the_first_recorded_one(tmp_path: Path) -> None:
    late = START_NS + 3 * 50_000_000 + 2_000_000
    messages = [(topic, kind, late if kind == STRING else time_ns, item) for topic, kind, time_ns, item in recording()]
    bag = write_bag(tmp_path / "bag", sorted(messages, key=lambda item: item[2]))
    assert read(bag) == (2, Counter({(CAMERA[1:], DropReason.NO_INSTRUCTION): 3}))
    frames = [item for item in read_frames(bag, CONTRACT, instruction="wait") if isinstance(item, Frame)]
    assert [(frame.instruction, frame.episode) for frame in frames] == [("wait", 0)] * 3 + [("open the drawer", 1)] * 2


@pytest.mark.parametrize("name", ["service_event", "json_channel", "noprofile"])
def test_whole_files_of_other_recorders_are_read(name: str) -> None:
    """Eight frames each, written by the official MCAP library, with a topic that the contract does not name."""
    assert read(DATA / f"{name}.mcap") == (8, Counter())


def test_foreign_topics_of_a_database_are_left_alone(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", recording(), StoragePlugin.SQLITE3)
    with sqlite3.connect(bag / "bag.db3") as database:
        database.execute("INSERT INTO topics VALUES (90, '/event', 'x/srv/Y_Event', 'cdr', '[[', '')")
        database.execute("INSERT INTO topics VALUES (91, '/json', 'x', 'json', '', '')")
        database.execute("INSERT INTO message_definitions VALUES (90, 'x/srv/Y_Event', 'unknown', '???', '')")
        database.execute("INSERT INTO messages VALUES (900, 91, 5, X'7B7D')")
    database.close()
    assert read(bag) == (5, Counter())


def test_a_database_without_definitions_has_those_of_jazzy(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", recording(), StoragePlugin.SQLITE3)
    with sqlite3.connect(bag / "bag.db3") as database:
        database.execute("DELETE FROM message_definitions WHERE topic_type LIKE '%JointState'")
    assert read(bag) == (5, Counter())
    with sqlite3.connect(bag / "bag.db3") as database:
        database.execute("DROP TABLE message_definitions")
        database.execute("ALTER TABLE topics DROP COLUMN offered_qos_profiles")
    database.close()
    assert read(bag) == (5, Counter())


def test_another_type_on_a_topic_of_the_contract_is_not_received(tmp_path: Path) -> None:
    """As in DDS, where a subscription matches its own type only: such a message does not even take back the task."""
    text = McapText()
    numbers = {topic: text.channel(topic, kind) for topic, kind in KINDS.items()}
    strange = [text.channel("/instruction", STRING, "json"), text.channel("/instruction", "std_msgs/msg/Header")]
    others = b"".join(message(number, START_NS + 1, b"{}") for number in strange)
    text.chunk(records_of(recording(), numbers) + others, START_NS, START_NS + 10**9)
    assert read(text.write(tmp_path / "bag.mcap")) == (5, Counter())


def test_a_contract_topic_that_no_publisher_serves_rightly_is_named(tmp_path: Path) -> None:
    text = McapText()
    text.channel("/instruction", STRING, "json")
    with pytest.raises(
        ContractError, match=r"topic /instruction is std_msgs/msg/String \(json\), .* expects .* \(cdr\)"
    ):
        read(text.write(tmp_path / "bag.mcap"))
    text = McapText()
    numbers = {topic: text.channel(topic, kind, language="ros2msg") for topic, kind in KINDS.items()}
    text.chunk(records_of(recording(), numbers), START_NS, START_NS + 10**9)
    with pytest.raises(ContractError, match="topic /instruction: the bag's description of std_msgs/msg/String is not"):
        read(text.write(tmp_path / "bag.mcap"))


IDL = """\
{line}
IDL: sensor_msgs/msg/JointState
// generated from rosidl_adapter/resource/msg.idl.em
#include "std_msgs/msg/Header.idl"
module sensor_msgs {
  module msg {
    @verbatim (language="comment", text="The state of the joints.")
    struct JointState {
      std_msgs::msg::Header header;
      sequence<string> name;
      sequence<double> position;
      sequence<double> velocity;
      sequence<double> effort;
    };
  };
};
{line}
IDL: std_msgs/msg/Header
#include "builtin_interfaces/msg/Time.idl"
module std_msgs {
  module msg {
    struct Header {
      builtin_interfaces::msg::Time stamp;
      string frame_id;
    };
  };
};
"""


@pytest.mark.parametrize(
    ("wrong", "right", "whole"), [("", "", True), ("position;", "place;", False), ("double", "float", False)]
)
def test_a_type_described_in_idl_must_be_jazzy_s(tmp_path: Path, wrong: str, right: str, whole: bool) -> None:
    bag = write_bag(tmp_path / "bag", recording(), StoragePlugin.SQLITE3)
    text = IDL.replace("{line}", "=" * 80).replace(wrong, right)
    with sqlite3.connect(bag / "bag.db3") as database:
        change = (
            "UPDATE message_definitions SET encoding = 'ros2idl', encoded_message_definition = ? WHERE topic_type = ?"
        )
        database.execute(change, (text, JOINT_STATE))
    database.close()
    if whole:
        assert read(bag) == (5, Counter())
    else:
        with pytest.raises(ContractError, match="description of sensor_msgs/msg/JointState is not ROS 2 Jazzy's"):
            read(bag)


@pytest.mark.parametrize("summary", [True, False], ids=["summary", "no summary"])
@pytest.mark.parametrize("codec", ["", "lz4", "zstd"])
def test_chunks_that_overlap_and_messages_outside_of_chunks_come_in_order(
    tmp_path: Path, codec: str, summary: bool
) -> None:
    """Random times over chunks of random order, against Python's sort, which keeps the file's order of equal times."""
    generator = np.random.default_rng(7)
    text = McapText()
    number = text.channel("/instruction", STRING)
    expected: list[tuple[int, bytes]] = []
    alone: list[bytes] = []
    for chunk in generator.permutation(12):
        times = 100 * int(chunk) + generator.integers(0, 250, 9)
        items = [(int(time), b"%d %d" % (chunk, place)) for place, time in enumerate(times)]
        records = b"".join(message(number, *item) for item in items)
        if chunk % 4 == 3:
            text.body += text.declarations() + records
            alone += [data for _, data in items]
        else:
            text.chunk(text.declarations() + records, int(times.min()), int(times.max()), codec, crc=bool(chunk % 2))
        expected += items
    with open_bag(text.write(tmp_path / "bag.mcap", summary)) as bag:
        found = [(item.time_ns, item.data) for item in bag.messages(bag.channels)]
    assert sorted(found) == sorted(expected) and len(alone) == 27
    assert [time for time, _ in found] == sorted(time for time, _ in expected)
