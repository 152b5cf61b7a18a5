"""Damaged bags: bad messages are dropped and counted, damaged files are one line that says what is wrong."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin, Writer

from calibrator.__main__ import main
from tests.core import ros_messages as msgs
from tests.core.bags import write_bag
from tests.core.mcap_writer import McapText
from tests.core.packed_bags import CAMERA, DATA, KINDS, packed_bag, read, records_of
from tests.core.test_bag import CONTRACT, START_NS, recording
from vla_policy.core.errors import ContractError
from vla_policy.core.synchroniser import DropReason


def test_one_bad_message_is_dropped_and_counted(tmp_path: Path) -> None:
    """Bytes that are no message of the topic's type: cut off, too long, of another encapsulation, empty."""
    connections: dict[str, Any] = {}
    with Writer(tmp_path / "bag", version=9) as writer:
        for place, (topic, kind, time_ns, content) in enumerate(recording()):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=msgs.STORE)
            data = bytes(msgs.STORE.serialize_cdr(content, kind))
            damaged = {
                3: data[:20],
                5: data + b"more than that",
                7: b"\1\2" + data[2:],
                8: b"",
                9: data[:4] + b"\xff" * 40,
            }
            writer.write(connections[topic], time_ns, damaged.get(place, data))
    frames, dropped = read(tmp_path / "bag")
    assert frames == 2 and sum(dropped[key] for key in dropped if key[1] is DropReason.INVALID_MESSAGE) == 5
    assert set(dropped) <= {
        ("joint_states", DropReason.INVALID_MESSAGE),
        (CAMERA[1:], DropReason.INVALID_MESSAGE),
        (CAMERA[1:], DropReason.UNSYNCHRONISED),
    }


def damaged_message(path: Path) -> Path:
    bag = packed_bag(path, "MESSAGE", StoragePlugin.SQLITE3)
    with sqlite3.connect(bag / f"{path.name}.db3") as database:
        ((data,),) = database.execute("SELECT data FROM messages WHERE id = 4")
        database.execute("UPDATE messages SET data = ? WHERE id = 4", (data[:20],))
    database.close()
    return bag


def flipped(codec: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        text = McapText()
        numbers = {topic: text.channel(topic, kind) for topic, kind in KINDS.items()}
        text.chunk(records_of(recording(), numbers), START_NS, START_NS + 10**9, codec)
        content = bytearray(text.write(path.with_suffix(".mcap")).read_bytes())
        content[300:340] = bytes(40)
        path.with_suffix(".mcap").write_bytes(content)
        return path.with_suffix(".mcap")

    return make


def cut(mode: str, storage: StoragePlugin) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        bag = packed_bag(path, mode, storage)
        (file,) = bag.glob(f"{path.name}.*")
        file.write_bytes(file.read_bytes()[:1500])
        return bag

    return make


def content(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.with_name(name).write_bytes(data)
        return path.with_name(name)

    return make


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: DATA / "hole.mcap", "decompress"),
        (flipped(""), "the chunk at byte .* is damaged"),
        (flipped("lz4"), "LZ4F_decompress"),
        (flipped("zstd"), "decompress|damaged"),
        (cut("FILE", StoragePlugin.MCAP), "ended before the end-of-stream marker"),
        (cut("FILE", StoragePlugin.SQLITE3), "ended before the end-of-stream marker"),
        (cut("STORAGE", StoragePlugin.MCAP), "it is cut off"),
        (cut("MESSAGE", StoragePlugin.SQLITE3), "malformed"),
        (damaged_message, "frame is incomplete|ended before|decompress"),
        (content("eight.mcap", b"\x89MCAP0\r\n"), "it is cut off"),
        (content("bag.mcap", b""), "it does not begin as an MCAP file does"),
        (content("bag.mcap", b"version https://git-lfs.github.com/spec/v1\n"), "it does not begin as an MCAP"),
        (content("bag.db3", b""), "no table of topics"),
        (content("bag.db3", b"version https://git-lfs.github.com/spec/v1\n"), "file is not a database"),
        (content("bag.mcap.zstd", b"text"), "Unknown frame descriptor|decompress"),
        (content("bag.bag", b"#ROSBAG V2.0\n"), "a ROS 1 bag: convert it with rosbags-convert"),
    ],
)
def test_damage_is_one_line_and_exit_code_two(
    tmp_path: Path, make: Callable[[Path], Path], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = make(tmp_path / "bag")
    with pytest.raises(ContractError, match=f"not a readable ROS 2 bag .*{reason}"):
        read(bag)
    if bag.suffix != ".bag":
        out = tmp_path / "set"
        assert main(["collect", str(bag), "--contract", CONTRACT.path, "--out", str(out), "--samples", "1"]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("mode", ["FILE", "MESSAGE", "STORAGE"])
@pytest.mark.parametrize("storage", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_no_overwritten_byte_is_more_than_an_error_line(tmp_path: Path, mode: str, storage: StoragePlugin) -> None:
    if mode == "STORAGE" and storage is StoragePlugin.SQLITE3:
        bag = write_bag(tmp_path / "bag", recording(), storage)
    else:
        bag = packed_bag(tmp_path / "bag", mode, storage)
    (file,) = bag.glob("bag.*")
    whole, generator = file.read_bytes(), np.random.default_rng(5)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] = generator.integers(256)
        file.write_bytes(damaged)
        try:
            frames, _ = read(bag)
        except ContractError as error:
            assert "\n" not in str(error)
        else:
            assert frames <= 5


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    whole = (DATA / "noprofile.mcap").read_bytes()
    for size in range(0, len(whole), 61):
        (tmp_path / "bag.mcap").write_bytes(whole[:size])
        with pytest.raises(ContractError, match="not a readable ROS 2 bag"):
            read(tmp_path / "bag.mcap")
