"""Events to frames: the choice depends on stamps, not on arrival; nothing is dropped in silence."""

import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.core import ros_messages as msgs
from tests.core.events import single
from vla_policy.core.contract import POSE_STAMPED, Contract, StateTopic, StateValue, load_contract
from vla_policy.core.errors import DataError
from vla_policy.core.events import Event
from vla_policy.core.synchroniser import Dropped, DropReason, Frame, Synchroniser

CONTRACT = load_contract(Path(__file__).parents[2] / "ros2_ws/src/vla_policy/config/libero.yaml")
CAMERA, STATE, INSTRUCTION = CONTRACT.primary.topic, CONTRACT.states[0].topic, CONTRACT.instruction.topic
START_NS = 1_000 * 10**9
MS = 10**6
POSE = (("Point", (1.0, 2.0, 3.0)), ("Quaternion", (0.1, 0.2, 0.3, 0.9)))


def camera(ms: int, value: int = 0) -> Event:
    stamp = START_NS + ms * MS
    return single(CONTRACT, CAMERA, msgs.compressed(stamp, msgs.picture(value)), stamp)


def state(ms: int, x: float = 0.0) -> Event:
    stamp = START_NS + ms * MS
    return single(CONTRACT, STATE, msgs.joints(stamp, [x, 0.1, 0.2, 0.04], [0, 0, 0, -0.5]), stamp)


def instruction(ms: int, text: str = "pick up the soup") -> Event:
    return single(CONTRACT, INSTRUCTION, msgs.text(text), START_NS + ms * MS)


def served(events: list[Event | Dropped], contract: Contract = CONTRACT) -> list[Frame | Dropped]:
    synchroniser = Synchroniser(contract)
    results = [result for event in events for result in synchroniser.offer(event)]
    return results + synchroniser.flush()


def frames(results: list[Frame | Dropped]) -> list[Frame]:
    return [result for result in results if isinstance(result, Frame)]


def reasons(results: list[Frame | Dropped]) -> list[DropReason]:
    return [result.reason for result in results if isinstance(result, Dropped)]


def test_the_nearest_state_is_taken_whatever_arrived_first() -> None:
    events = [instruction(0), state(10, 1.0), camera(20), state(22, 2.0), camera(40), state(41, 3.0)]
    swapped = [events[0], events[1], events[3], events[2], events[5], events[4]]
    for order in (events, swapped):
        result = frames(served(order))
        assert [frame.state[0] for frame in result if frame.state is not None] == [2.0, 3.0]
        assert [frame.skew_ns for frame in result] == [2 * MS, 1 * MS]


def test_the_state_vector_follows_the_contract() -> None:
    (frame,) = frames(served([instruction(0), state(10, 1.0), camera(10)]))
    assert frame.state is not None and frame.state.dtype == np.float32
    np.testing.assert_allclose(frame.state, [1.0, 0.1, 0.2, 0.04, -0.5])


def test_a_frame_with_an_equal_stamp_is_served_at_once() -> None:
    synchroniser = Synchroniser(CONTRACT)
    synchroniser.push(instruction(0))
    synchroniser.push(state(10))
    assert len(synchroniser.push(camera(10))) == 1


def test_the_slop_is_the_farthest_that_a_sample_may_be() -> None:
    assert CONTRACT.synchronisation.slop_ms == 50
    (frame,) = served([instruction(0), state(10), camera(60)])
    assert isinstance(frame, Frame) and frame.skew_ns == 50 * MS
    assert reasons(served([instruction(0), state(10), camera(61)])) == [DropReason.UNSYNCHRONISED]


def test_of_two_samples_at_equal_distance_the_later_one_is_taken() -> None:
    (frame,) = frames(served([instruction(0), state(10, 1.0), state(30, 2.0), camera(20)]))
    assert frame.state is not None and frame.state[0] == 2.0


def test_the_skew_of_a_frame_is_its_farthest_sample_s() -> None:
    second = replace(CONTRACT.states[0], topic="second")
    contract = replace(CONTRACT, states=(CONTRACT.states[0], second))
    late = state(3)
    events = [instruction(0), state(10), replace(late, source="second"), camera(10), state(20)]
    other = [events[0], replace(state(3), source=STATE), replace(state(10), source="second"), camera(10)]
    for order in (events, other):
        (frame,) = frames(served(order, contract))
        assert frame.skew_ns == 7 * MS


def test_a_state_out_of_order_is_left_out() -> None:
    results = served([instruction(0), state(30, 1.0), state(20, 2.0), camera(22)])
    assert reasons(results) == [DropReason.OUT_OF_ORDER]
    assert [frame.state[0] for frame in frames(results) if frame.state is not None] == [1.0]


@pytest.mark.parametrize(("back_ms", "reason"), [(1000, DropReason.OUT_OF_ORDER), (1001, DropReason.CLOCK_JUMP)])
def test_a_stamp_more_than_a_second_behind_is_another_clock(back_ms: int, reason: DropReason) -> None:
    results = served([instruction(0), state(5000), camera(5000), camera(5000 - back_ms)])
    assert len(frames(results)) == 1 and reasons(results) == [reason]


def test_what_was_sampled_on_the_former_clock_serves_no_frame_of_the_new_one() -> None:
    """The image comes first here: it waits for its own state and is not dropped for the one from the future."""
    results = served([instruction(0), state(5000), camera(5000), camera(10), camera(43), state(44)])
    assert reasons(results) == [DropReason.CLOCK_JUMP]
    assert [frame.skew_ns for frame in frames(results)] == [0, 1 * MS]


def test_frames_that_wait_do_not_pile_up() -> None:
    synchroniser = Synchroniser(CONTRACT)
    synchroniser.push(instruction(0))
    dropped = [result for ms in range(70) for result in synchroniser.push(camera(10 + ms))]
    assert [result.detail for result in dropped if isinstance(result, Dropped)] == ["64 frames wait already"] * 6
    assert reasons(dropped) == [DropReason.UNSYNCHRONISED] * 6


def test_a_silent_state_makes_frames_unsynchronised() -> None:
    results = served([instruction(0), state(10), camera(10), *(camera(10 + 33 * k) for k in range(1, 10))])
    assert len(frames(results)) == 2  # the second is within the slop of the last sample
    assert reasons(results) == [DropReason.UNSYNCHRONISED] * 8


def test_live_expiry_decides_as_the_end_of_a_recording_does() -> None:
    synchroniser = Synchroniser(CONTRACT)
    for event in (instruction(0), state(10), camera(30)):
        assert synchroniser.push(event) == []
    assert synchroniser.expire(START_NS + 129 * MS) == []
    (frame,) = synchroniser.expire(START_NS + 130 * MS)
    assert isinstance(frame, Frame) and frame.skew_ns == 20 * MS


def test_no_instruction_no_frame() -> None:
    assert reasons(served([state(10), camera(10)])) == [DropReason.NO_INSTRUCTION]
    results = served([instruction(0), state(10), camera(10), instruction(15, "  "), state(20), camera(20)])
    assert len(frames(results)) == 1 and reasons(results) == [DropReason.NO_INSTRUCTION]


def test_a_refused_instruction_leaves_no_task() -> None:
    refused = Dropped(INSTRUCTION, START_NS, DropReason.INVALID_MESSAGE, "too long")
    results = served([instruction(0), refused, state(10), camera(10)])
    assert reasons(results) == [DropReason.INVALID_MESSAGE, DropReason.NO_INSTRUCTION]


REFUSED = Dropped(INSTRUCTION, START_NS, DropReason.INVALID_MESSAGE, "too long")


@pytest.mark.parametrize(
    ("between", "episodes"),
    [
        ([instruction(25)], [0, 0]),
        ([instruction(25, " pick\u00a0up\tthe\n soup ")], [0, 0]),
        ([instruction(25, "open the drawer")], [0, 1]),
        ([instruction(25, ""), instruction(26)], [0, 1]),
        ([REFUSED, instruction(26)], [0, 1]),
        ([instruction(25, "open the drawer"), instruction(26)], [0, 1]),
    ],
    ids=["again", "again, other white space", "another", "none between", "refused between", "none of its frames"],
)
def test_an_episode_begins_with_another_instruction(between: list[Event | Dropped], episodes: list[int]) -> None:
    results = frames(served([instruction(0), state(10), camera(10), *between, state(30), camera(30)]))
    assert [frame.episode for frame in results] == episodes
    assert [frame.step for frame in results] == [0, 1 - episodes[1]]
    assert {frame.instruction for frame in results} <= {"pick up the soup", "open the drawer"}


def test_an_episode_begins_after_a_pause_of_the_images_and_where_the_clock_is_set_back() -> None:
    times = (0, 4999, 9999, 20_000, 20_050, 50, 100)
    results = frames(served([instruction(0), *(make(ms) for ms in times for make in (state, camera))]))
    places = [((frame.stamp_ns - START_NS) // MS, frame.episode, frame.step) for frame in results]
    assert places == [(0, 0, 0), (4999, 0, 1), (9999, 0, 2), (20_000, 1, 0), (20_050, 1, 1), (100, 2, 0)]


@pytest.mark.parametrize("text", ["pick up\u00a0the soup", "pick up the soup\n", "\tpick  up the\r\nsoup"])
def test_white_space_of_every_kind_is_a_blank(text: str) -> None:
    assert instruction(0, text).payload == "pick up the soup"


def two_publishers() -> Contract:
    """The arm's joints and the gripper's come from two drivers on one topic."""
    arm, gripper = CONTRACT.states[0].values[:3], CONTRACT.states[0].values[3:]
    states = [replace(CONTRACT.states[0], values=values, shared=True) for values in (arm, gripper)]
    return replace(CONTRACT, states=tuple(states))


def part(ms: int, names: tuple[str, ...], values: list[float]) -> Event:
    stamp = START_NS + ms * MS
    return single(two_publishers(), STATE, msgs.joints(stamp, values, names=names), stamp)


def test_two_publishers_of_one_topic_are_merged_by_their_joints() -> None:
    contract, arm, gripper = two_publishers(), msgs.JOINTS[:3], msgs.JOINTS[3:]
    events = [instruction(0), part(9, arm, [1, 2, 3]), part(11, gripper, [0.04]), camera(10), part(12, arm, [7, 8, 9])]
    (frame,) = frames(served(events, contract))
    assert frame.state is not None
    np.testing.assert_allclose(frame.state, [1, 2, 3, 0.04, 0.0], rtol=1e-6)  # float32
    silent = served([instruction(0), part(9, arm, [1, 2, 3]), camera(10)], contract)
    assert reasons(silent) == [DropReason.UNSYNCHRONISED], "both must be there"
    with pytest.raises(DataError, match=r"joint 'end_effector_z' is missing.*an entry of their own"):
        part(0, arm[:2], [1, 2])


@pytest.mark.parametrize("seed", range(8))
def test_a_pose_as_axis_angle_is_scipy_s_rotation(seed: int) -> None:
    """OpenVLA-OFT's LIBERO state; half a turn and none at all included. Its angle is 2 acos(w), up to a whole turn."""
    turns = {0: [0.0, 0.0, 0.0, 1.0], 1: [0.0, 0.0, 0.0, -1.0], 2: [1.0, 0.0, 0.0, 0.0], 3: [0.0, 0.0, 1e-9, 1.0]}
    quaternion = turns.get(seed, np.random.default_rng(seed).normal(size=4).tolist())
    fields = tuple(f"axis_angle.{axis}" for axis in "xyz")
    values = tuple(StateValue(field, None, field, "rad") for field in fields)
    contract = replace(CONTRACT, states=(StateTopic("pose", POSE_STAMPED, values, CONTRACT.states[0].qos),))
    unit = (np.asarray(quaternion) / np.linalg.norm(quaternion)).tolist()
    point, turn = msgs.make("geometry_msgs/msg/Point", 1.0, 2.0, 3.0), msgs.make("geometry_msgs/msg/Quaternion", *unit)
    message = msgs.make(POSE_STAMPED, msgs.header(START_NS), msgs.make("geometry_msgs/msg/Pose", point, turn))
    got = single(contract, "pose", message, START_NS).payload
    assert isinstance(got, np.ndarray)
    # float64 through a few products and an arc cosine, which loses half of its digits near 1 and -1.
    difference = Rotation.from_rotvec(got) * Rotation.from_quat(unit).inv()
    assert difference.magnitude() < 1e-7
    np.testing.assert_allclose(np.linalg.norm(got) % (2 * np.pi), 2 * np.arccos(unit[3]) % (2 * np.pi), atol=1e-7)


def test_repeated_and_late_stamps_are_out_of_order() -> None:
    results = served([instruction(0), state(10), camera(10), camera(10), camera(5)])
    assert len(frames(results)) == 1 and reasons(results) == [DropReason.OUT_OF_ORDER] * 2


def test_a_clock_set_back_starts_a_new_timeline() -> None:
    events = [instruction(0), state(5000), camera(5000), state(10), camera(10), state(43), camera(43)]
    results = served(events)
    assert reasons(results) == [DropReason.CLOCK_JUMP]
    assert [frame.stamp_ns - START_NS for frame in frames(results)] == [5000 * MS, 43 * MS]


def test_a_camera_that_jumps_ahead_is_unsynchronised_until_it_comes_back() -> None:
    events = [instruction(0), state(10), camera(10), camera(90_000), state(43), camera(43), state(76), camera(76)]
    results = served(events)
    assert reasons(results) == [DropReason.UNSYNCHRONISED, DropReason.CLOCK_JUMP]
    assert [frame.stamp_ns - START_NS for frame in frames(results)] == [10 * MS, 76 * MS]


def test_a_frame_keeps_the_task_under_which_it_arrived() -> None:
    results = frames(
        served([instruction(0, "one"), camera(10), instruction(15, "two"), state(10), state(20), camera(20)])
    )
    assert [(frame.instruction, frame.episode, frame.step) for frame in results] == [("one", 0, 0), ("two", 1, 0)]


@pytest.mark.parametrize(
    ("topic", "message", "expected"),
    [
        (STATE, msgs.joints(START_NS, [0, 0, float("nan"), 0]), "state z is not finite"),
        (STATE, msgs.joints(START_NS, [0, 0, 0], names=msgs.JOINTS[:3]), "joint 'gripper' is missing"),
        (STATE, msgs.joints(START_NS, [0, 0, 0, 0], []), "joint 'gripper' has no velocity"),
        (STATE, msgs.joints(0, [0, 0, 0, 0]), "must stamp its messages"),
        (INSTRUCTION, msgs.text("a" * 10_000), "instruction of 10000 characters; at most 500"),
        (INSTRUCTION, msgs.text("a\x00b"), "not printable"),
    ],
)
def test_a_message_that_must_not_be_used_is_refused(topic: str, message: object, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        single(CONTRACT, topic, message, START_NS)


def test_an_end_effector_pose_is_a_state() -> None:
    fields = ("orientation.w", "position.x", "position.z")
    values = tuple(StateValue(field, None, field, "1") for field in fields)
    pose = StateTopic("tool_pose", POSE_STAMPED, values, CONTRACT.states[0].qos)
    contract = replace(CONTRACT, states=(pose,))
    point, turn = (msgs.make(f"geometry_msgs/msg/{kind}", *numbers) for kind, numbers in POSE)
    message = msgs.make(POSE_STAMPED, msgs.header(START_NS), msgs.make("geometry_msgs/msg/Pose", point, turn))
    np.testing.assert_array_equal(single(contract, "tool_pose", message, START_NS).payload, [0.9, 1.0, 3.0])
    point.z = float("inf")
    with pytest.raises(DataError, match=r"tool_pose: state position\.z is not finite"):
        single(contract, "tool_pose", message, START_NS)


def test_the_search_for_the_nearest_sample_equals_brute_force() -> None:
    """Whatever the order of arrival: all states first, merged by stamp, or each topic late by its own amount."""
    generator = np.random.default_rng(3)
    stamps = np.cumsum(generator.integers(1, 40, 200))
    targets = np.unique(generator.integers(30, int(stamps[-1]) - 30, 50))
    states = [(int(ms), state(int(ms), float(ms))) for ms in stamps]
    cameras = [(int(ms), camera(int(ms))) for ms in targets]
    merged = sorted(states + cameras, key=lambda item: item[0])
    late_states = sorted([(ms + 35, event) for ms, event in states] + cameras, key=lambda item: item[0])
    late_cameras = sorted(states + [(ms + 35, event) for ms, event in cameras], key=lambda item: item[0])
    for order in (states + cameras, merged, late_states, late_cameras):
        found = frames(served([instruction(0), *(event for _, event in order)]))
        assert len(found) == len(targets)
        for frame, target in zip(found, targets, strict=True):
            assert frame.state is not None
            assert abs(frame.state[0] - target) == np.abs(stamps - target).min()


def test_images_of_a_second_camera_do_not_pile_up() -> None:
    """Neither beside the first camera, nor while that one is silent: raw images would fill the memory."""
    wrist = replace(CONTRACT.primary, name="wrist", topic="wrist/compressed")
    contract = replace(CONTRACT, cameras=(CONTRACT.primary, wrist), states=())
    synchroniser = Synchroniser(contract)
    alive: list[weakref.ref[Event]] = []

    def see(topic: str, ms: int) -> list[Frame | Dropped]:
        stamp_ns = START_NS + ms * MS
        event = single(contract, topic, msgs.compressed(stamp_ns, msgs.picture(ms)), stamp_ns)
        alive.append(weakref.ref(event))
        return synchroniser.push(event)

    synchroniser.push(instruction(0))
    for ms in range(10, 5010, 10):
        see(wrist.topic, ms)
        (frame,) = see(CAMERA, ms)
        assert isinstance(frame, Frame) and frame.skew_ns == 0
    assert sum(event() is not None for event in alive) < 4
    for ms in range(5010, 10_010, 10):
        see(wrist.topic, ms)
    assert sum(event() is not None for event in alive) == 128
    (frame,) = see(CAMERA, 9995)
    assert isinstance(frame, Frame) and frame.skew_ns == 5 * MS
