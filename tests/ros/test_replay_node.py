"""A bag over DDS through the node's process: every frame answered, as in process; recorders write whole bags."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rosbags.rosbag2 import StoragePlugin, Writer

from tests.core import ros_messages
from tests.core.bags import Message, write_bag
from tests.core.ros_messages import STORE
from tests.core.test_bag import CONTRACT as LOADED
from tests.core.test_bag import recording
from tests.ros.fake_policy_node import echo
from tests.ros.world import CONTRACT, WRIST, World, end, fake_engine, fresh_domain, node_command, process, two_cameras
from vla_policy.core.bag import read_frames
from vla_policy.core.contract import JOINT_STATE, load_contract
from vla_policy.core.errors import DataError
from vla_policy.core.observe import observe
from vla_policy.core.recording import BagWriter, recorded_qos
from vla_policy.core.served import read_served
from vla_policy.core.synchroniser import Frame

from rclpy.qos import DurabilityPolicy, ReliabilityPolicy  # isort: skip  # after the importorskip in tests.ros.world


def replay_command(bag: Path, **parameters: object) -> list[str]:
    values = {"bag": bag, "contract": CONTRACT, **parameters}
    arguments = [item for name, value in values.items() for item in ("-p", f"{name}:={value}")]
    return [sys.executable, "-m", "vla_policy.nodes.replay_node", "--ros-args", *arguments]


@pytest.mark.parametrize(
    ("storage", "rate", "cameras"), [(StoragePlugin.MCAP, 0.0, 2), (StoragePlugin.SQLITE3, 2.0, 1)]
)
def test_served_actions_equal_the_in_process_ones(
    tmp_path: Path, storage: StoragePlugin, rate: float, cameras: int
) -> None:
    path = CONTRACT if cameras == 1 else two_cameras(tmp_path / "contract.yaml")
    contract = load_contract(path)
    bag = write_bag(tmp_path / "bag", recording(frames=40, wrist=WRIST["topic"] if cameras == 2 else ""), storage)
    engine = fake_engine(tmp_path / "engine", action="echo", images=cameras)
    domain, log = fresh_domain(), tmp_path / "log"
    node = node_command(engine, path, lossless=True, check_sources="none", use_sim_time=True)
    served_bag, summary_path = tmp_path / "served", tmp_path / "summary.json"
    replay = replay_command(bag, contract=path, rate=rate, served=served_bag, summary=summary_path)
    with process(node, domain, log), process(replay, domain, log) as replaying:
        assert replaying.wait(60) == 0, log.read_text()
    summary = json.loads(summary_path.read_text())
    assert (summary["frames"], summary["answered"]) == (40, 40)
    served = {action.stamp_ns: action for action in read_served(served_bag)}
    frames = [frame for frame in read_frames(bag, contract) if isinstance(frame, Frame)]
    assert len(served) == len(frames) == 40
    for frame in frames:
        observation = observe(frame, contract)
        assert len(observation.images) == cameras
        np.testing.assert_array_equal(served[frame.stamp_ns].actions[0], echo(observation))
        assert served[frame.stamp_ns].instruction == frame.instruction


def test_an_arm_and_a_gripper_that_publish_apart_are_served_as_in_process(tmp_path: Path) -> None:
    """On one topic, the gripper 2 ms later; one message of it is damaged, and is not sent."""
    content = yaml.safe_load(CONTRACT.read_text())
    (whole,) = content["states"]
    content["states"] = [whole | {"values": whole["values"][part]} for part in (slice(3), slice(3, 5))]
    path = tmp_path / "contract.yaml"
    path.write_text(yaml.safe_dump(content))
    contract, kinds = load_contract(path), dict[str, Any]()
    with Writer(tmp_path / "bag", version=9) as writer:
        for place, (topic, kind, time_ns, message) in enumerate(apart(recording(frames=20))):
            if topic not in kinds:
                kinds[topic] = writer.add_connection(topic, kind, typestore=STORE)
            data = bytes(STORE.serialize_cdr(message, kind))
            writer.write(kinds[topic], time_ns, data[:20] if place == 5 else data)
    engine, domain, log = fake_engine(tmp_path / "engine", action="echo"), fresh_domain(), tmp_path / "log"
    node = node_command(engine, path, lossless=True, check_sources="none", use_sim_time=True)
    replay = replay_command(tmp_path / "bag", contract=path, rate=0.0, served=tmp_path / "served")
    with process(node, domain, log), process(replay, domain, log) as replaying:
        assert replaying.wait(60) == 0, log.read_text()
    assert log.read_text().count("not sent: /joint_states: a message of 20 bytes is damaged") == 1
    served = {action.stamp_ns: action for action in read_served(tmp_path / "served")}
    results = list(read_frames(tmp_path / "bag", contract))
    frames = [item for item in results if isinstance(item, Frame)]
    assert len(served) == len(frames) == 20 and len(results) == 21
    for frame in frames:
        np.testing.assert_array_equal(served[frame.stamp_ns].actions[0], echo(observe(frame, contract)))


def apart(messages: list[Message]) -> Iterator[Message]:
    """Each joint state as two messages."""
    for topic, kind, time_ns, message in messages:
        if kind != JOINT_STATE:
            yield topic, kind, time_ns, message
            continue
        for part, late_ns in ((slice(3), 0), (slice(3, 4), 2_000_000)):
            values = [field[part].tolist() for field in (message.position, message.velocity)]
            joints = ros_messages.joints(time_ns + late_ns, *values, names=message.name[part])
            yield topic, kind, time_ns + late_ns, joints


def test_frames_that_are_never_answered_are_given_up_and_counted(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", recording(frames=20))
    engine = fake_engine(tmp_path / "engine", fail_after=8)  # three warm-up decisions and five frames
    domain, log, summary = fresh_domain(), tmp_path / "log", tmp_path / "summary.json"
    node = node_command(engine, lossless=True, check_sources="none", use_sim_time=True)
    replay = replay_command(bag, rate=0.0, summary=summary, answer_timeout=0.5)
    with process(node, domain, log), process(replay, domain, log) as replaying:
        assert replaying.wait(60) == 0, log.read_text()
    content = json.loads(summary.read_text())
    assert (content["frames"], content["answered"]) == (20, 5)


def test_nobody_waits_for_frames_that_cannot_be_answered(tmp_path: Path) -> None:
    """As fast as it goes, with a minute's patience: images before the task, without a state near them, and without a
    picture, more than may be in flight, also at the end. The policy's answers are those of the frames in process."""
    seen = 0

    def damaged(messages: list[Message]) -> Iterator[Message]:
        nonlocal seen
        for topic, kind, time_ns, message in messages:
            if topic == "/camera/image_raw/compressed":
                seen += 1
                if seen in range(50, 62) or seen > 80:
                    message = ros_messages.encoded(time_ns, b"no picture")
            elif kind == JOINT_STATE and seen in range(65, 76):
                continue
            yield topic, kind, time_ns, message

    messages = recording(frames=92)
    task = next(item for item in messages if item[0] == "/instruction")
    (late,) = [item[2] for item in messages if item[0] == "/camera/image_raw/compressed"][24:25]
    messages = [item for item in messages if item is not task]
    place = next(index for index, item in enumerate(messages) if item[2] >= late)
    messages.insert(place, (task[0], task[1], late, task[3]))
    bag = write_bag(tmp_path / "bag", damaged(messages))
    engine, domain, log = fake_engine(tmp_path / "engine", action="echo"), fresh_domain(), tmp_path / "log"
    node = node_command(engine, lossless=True, check_sources="none", use_sim_time=True)
    replay = replay_command(bag, rate=0.0, served=tmp_path / "served", answer_timeout=60.0)
    with process(node, domain, log), process(replay, domain, log) as replaying:
        assert replaying.wait(50) == 0, log.read_text()
    served = {action.stamp_ns: action for action in read_served(tmp_path / "served")}
    answered = {}
    for frame in read_frames(bag, LOADED):
        if isinstance(frame, Frame):
            with suppress(DataError):
                answered[frame.stamp_ns] = echo(observe(frame, LOADED))
    assert served.keys() == answered.keys() and 30 < len(served) < 50
    for stamp_ns, action in answered.items():
        np.testing.assert_array_equal(served[stamp_ns].actions[0], action)


def test_a_bag_that_tells_no_task_is_replayed_with_one(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", [item for item in recording(frames=20) if item[0] != "/instruction"])
    engine, domain, log = fake_engine(tmp_path / "engine", action="echo"), fresh_domain(), tmp_path / "log"
    node = node_command(engine, lossless=True, check_sources="none", use_sim_time=True)
    with process(node, domain, log):
        with process(replay_command(bag, rate=0.0), domain, log) as replaying:
            assert replaying.wait(60) == 2
        assert "no topic /instruction" in log.read_text()
        replay = replay_command(bag, rate=0.0, served=tmp_path / "served", instruction="pick up the soup")
        with process(replay, domain, log) as replaying:
            assert replaying.wait(60) == 0, log.read_text()
    served = list(read_served(tmp_path / "served"))
    assert len(served) == 20 and {action.instruction for action in served} == {"pick up the soup"}


def test_topics_are_offered_with_the_recorded_quality_of_service(tmp_path: Path) -> None:
    best_effort, kept = recorded_qos(False, False, 5), recorded_qos(True, True, 1)
    with BagWriter(tmp_path / "bag") as writer:
        for topic, kind, time_ns, message in recording():
            writer.add_topic(topic, kind, kept if topic == "/instruction" else best_effort)
            writer.write(topic, time_ns, STORE.serialize_cdr(message, kind))
    world = World(fresh_domain(), rate_hz=None)
    try:
        with process(replay_command(tmp_path / "bag"), world.domain, tmp_path / "log") as replaying:
            for topic, expected, count in (  # the robot's own publishers are reliable, its instruction is kept
                ("joint_states", (ReliabilityPolicy.BEST_EFFORT, DurabilityPolicy.VOLATILE), 1),
                ("instruction", (ReliabilityPolicy.RELIABLE, DurabilityPolicy.TRANSIENT_LOCAL), 2),
            ):
                world.wait(lambda topic=topic: world.node.count_publishers(topic) == 2, "the replay's own publisher")
                offered = [item.qos_profile for item in world.node.get_publishers_info_by_topic(topic)]
                found = [(item.reliability, item.durability) for item in offered]
                assert found.count(expected) == count
            assert end(replaying, signal.SIGINT) == 0
    finally:
        world.close()


def test_a_bag_that_does_not_fit_is_one_line_and_exit_code_two(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(replay_command(tmp_path / "none"), fresh_domain(), log) as replaying:
        assert replaying.wait(30) == 2
    assert "error: " in log.read_text() and "no such bag" in log.read_text() and "Traceback" not in log.read_text()


def test_a_recorder_whose_disk_is_full_says_so_and_leaves_no_bag(tmp_path: Path) -> None:
    world, output, log = World(fresh_domain()), tmp_path / "recorded", tmp_path / "log"
    recorder = (
        f"{sys.executable} -m vla_policy.nodes.record_node --ros-args -p output:={output} -p contract:={CONTRACT}"
    )
    try:
        with process(["bash", "-c", f"ulimit -f 16; exec {recorder}"], world.domain, log) as recording:
            world.wait(lambda: world.node.count_subscribers("camera/image_raw/compressed") > 0, "the recorder")
            count = world.published
            world.wait(lambda: world.published > count + 30, "more images than fit")
            if recording.poll() is None:
                recording.send_signal(signal.SIGINT)
            assert recording.wait(30) == 2, log.read_text()
    finally:
        world.close()
    assert "error: " in log.read_text() and "check free space" in log.read_text()
    assert not output.exists() and [path.name for path in tmp_path.glob(".recorded*")] == []


def test_the_recorder_writes_what_was_published(tmp_path: Path) -> None:
    world = World(fresh_domain())
    output = tmp_path / "recorded"
    command = [sys.executable, "-m", "vla_policy.nodes.record_node", "--ros-args"]
    command += ["-p", f"output:={output}", "-p", f"contract:={CONTRACT}"]
    try:
        with process(command, world.domain, tmp_path / "log") as recorder:
            world.wait(lambda: world.node.count_subscribers("joint_states") > 0, "the recorder")
            world.wait(lambda: world.node.count_subscribers("camera/image_raw/compressed") > 0, "the recorder")
            world.instruct()
            count = world.published
            world.wait(lambda: world.published > count + 30, "some images")
            assert not output.exists(), "no half-written bag under its name"
            recorder.send_signal(signal.SIGINT)
            assert recorder.wait(30) == 0, (tmp_path / "log").read_text()
    finally:
        world.close()
    frames = [frame for frame in read_frames(output, LOADED) if isinstance(frame, Frame)]
    assert len(frames) > 5 and frames[0].instruction == "pick up the soup" and frames[0].skew_ns == 0
    assert [path.name for path in tmp_path.glob(".recorded*")] == []
