"""What a replay is written as for other tools. That the real lerobot package reads it is told in docs/results.md."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from calibrator.data.layout import RecordLayout
from calibrator.data.lerobot import LeRobotSource
from evaluation.__main__ import main
from evaluation.lerobot_set import SetRow, write_set
from tests.demo.materials import tiny_bag, tiny_contract
from tests.tiny import tiny_policy_folder
from vla_policy.core.bag import open_bag, read_frames
from vla_policy.core.contract import load_contract
from vla_policy.core.errors import DataError
from vla_policy.core.observe import observe
from vla_policy.core.synchroniser import Frame

REAL = Path(__file__).parents[1] / "data/lerobot/v3_images"


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bag replayed by two tiny policies, written in both forms."""
    folder = tmp_path_factory.mktemp("export")
    tiny_policy_folder(folder / "policy", seed=0)
    tiny_policy_folder(folder / "other", seed=1)
    tiny_contract(folder / "contract.yaml")
    tiny_bag(folder / "bag")
    command = ["replay", "--bag", folder / "bag", "--contract", folder / "contract.yaml"]
    command += ["--engine", folder / "other", "--against", folder / "policy", "--out", folder / "replay"]
    assert main([str(item) for item in [*command, "--lerobot", folder / "set", "--mcap", folder / "mcap"]]) == 0
    return folder


def frames(folder: Path) -> list[Frame]:
    contract = load_contract(folder / "contract.yaml")
    return [item for item in read_frames(folder / "bag", contract) if isinstance(item, Frame)]


def test_a_set_holds_what_was_seen_and_answered(replayed: Path) -> None:
    contract = load_contract(replayed / "contract.yaml")
    source = LeRobotSource(replayed / "set", RecordLayout(cameras=("observation.images.front",), action="action"))
    found = source.index()
    records = list(source.read({one.name: frozenset(one.steps) for one in found.trajectories}))
    expected = frames(replayed)
    assert not found.left_out and len(records) == len(expected) > 3
    table = pq.read_table(replayed / "set/data/chunk-000/file-000.parquet")
    for record, frame in zip(records, expected, strict=True):
        seen = observe(frame, contract)
        np.testing.assert_array_equal(record.observation.image, seen.image)
        np.testing.assert_array_equal(record.observation.state, seen.state)
        assert record.observation.instruction == frame.instruction
    starts = {frame.episode: frame.stamp_ns for frame in reversed(expected)}
    stamps = [(frame.stamp_ns - starts[frame.episode]) / 1e9 for frame in expected]
    np.testing.assert_allclose(np.ravel(table["action.stamp_s"].to_pylist()), stamps, rtol=1e-6)  # float32
    assert json.loads((replayed / "set/meta/vla_deploy.json").read_text())["candidate"] == "other"


def test_both_actions_are_those_of_the_replay(replayed: Path) -> None:
    """The page's figures come from the same answers: the largest error per dimension is the same."""
    table = pq.read_table(replayed / "set/data/chunk-000/file-000.parquet")
    action, reference = (np.asarray(table[name].to_pylist()) for name in ("action", "action.reference"))
    comparison = json.loads((replayed / "replay/replay.json").read_text())["comparison"]
    for column, dimension in enumerate(comparison["dimensions"]):
        error = np.abs(action - reference)[:, column].max()
        assert error == pytest.approx(dimension["maximum"], rel=1e-5, abs=1e-6)  # float32


def test_columns_have_the_types_that_the_real_package_writes(replayed: Path) -> None:
    for file in ("data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"):
        ours, real = pq.read_schema(replayed / "set" / file), pq.read_schema(REAL / file)
        for name in set(real.names) - {"action", "observation.state"}:
            if not name.startswith(("stats/", "observation.images")):
                kind = str(ours.field(name).type)
                assert kind == str(real.field(name).type).replace("large_string", "string"), (file, name)
    ours, real = (json.loads((folder / "meta/info.json").read_text()) for folder in (replayed / "set", REAL))
    assert set(ours) == set(real) and set(ours["features"]) >= {"action", "observation.state", "timestamp"}
    # lerobot's loader refuses a list of one.
    assert str(pq.read_schema(replayed / "set/data/chunk-000/file-000.parquet").field("action.stamp_s").type) == "float"
    pandas = json.loads(pq.read_schema(replayed / "set/meta/tasks.parquet").metadata[b"pandas"])
    assert pandas["index_columns"] == ["__index_level_0__"]


def test_the_bag_has_images_and_named_actions(replayed: Path) -> None:
    with open_bag(replayed / "mcap") as bag:
        held = {channel.topic for channel in bag.channels}
        messages = [(item.channel.topic, bag.decode(item)) for item in bag.messages(bag.channels)]
    assert held == {
        "/camera/front/compressed",
        "/instruction",
        "/action/candidate",
        "/action/reference",
        "/action/difference",
    }
    count = len(frames(replayed))
    by_topic = {topic: [message for name, message in messages if name == topic] for topic in held}
    assert {topic: len(found) for topic, found in by_topic.items() if topic != "/instruction"} == dict.fromkeys(
        held - {"/instruction"}, count
    )
    names = [dimension.name for dimension in load_contract(replayed / "contract.yaml").action.dimensions]
    topics = (by_topic[f"/action/{name}"] for name in ("candidate", "reference", "difference"))
    for mine, theirs, between in zip(*topics, strict=True):
        assert mine.name == names and mine.header.stamp == theirs.header.stamp
        np.testing.assert_allclose(mine.position - theirs.position, between.position)


def test_the_command_replaces_nothing_of_others(replayed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["replay", "--bag", replayed / "bag", "--contract", replayed / "contract.yaml"]
    command += ["--engine", replayed / "other", "--out", replayed / "again"]
    assert main([str(item) for item in [*command, "--lerobot", replayed / "policy"]]) == 2
    assert main([str(item) for item in [*command, "--mcap", replayed / "mcap"]]) == 2
    assert "exists already; choose another name or remove it" in capsys.readouterr().err
    assert (replayed / "policy/config.json").is_file() and not (replayed / "again").exists()


def row(size: int = 4, values: int = 2) -> SetRow:
    image = np.zeros((size, size, 3), np.uint8)
    return SetRow(0, "go", {"observation.images.a": image}, {"action": np.zeros(values)})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"set: no frame to write"),
        (
            [row(), row(size=5)],
            r"observation\.images\.a: an image of \[5, 5, 3\] after \(4, 4, 3\); a set has one size",
        ),
        ([row(), row(values=3)], r"action: 3 values for the names x, y"),
    ],
)
def test_rows_that_do_not_fit_leave_nothing(tmp_path: Path, rows: list[SetRow], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_set(tmp_path / "set", iter(rows), 5, {"action": ["x", "y"]}, "", {})
    assert not list(tmp_path.iterdir())
