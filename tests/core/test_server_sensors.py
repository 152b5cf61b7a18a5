"""The policy server's inputs: each must be fresh and alive, and clocks must go on; which one is not is named."""

import threading
from dataclasses import replace

import pytest

from tests.core import ros_messages as msgs
from tests.core.server_bench import CAMERA, CONTRACT, STATE, Bench
from vla_policy.core.safety import HoldReason
from vla_policy.core.synchroniser import DropReason


def test_a_frozen_camera_holds(bench: Bench) -> None:
    bench.moving()
    for _ in range(22):
        bench.see(picture=1)
        bench.answered()
    assert bench.reasons() == {HoldReason.FROZEN_CAMERA}
    bench.see()
    assert HoldReason.FROZEN_CAMERA not in bench.reasons()


def test_each_publisher_of_a_shared_topic_must_be_fresh_and_the_one_that_is_not_is_named() -> None:
    (whole,) = CONTRACT.states
    parts = tuple(replace(whole, values=values, shared=True) for values in (whole.values[:3], whole.values[3:]))
    bench = Bench(replace(CONTRACT, states=parts))
    bench.instruct()
    bench.server.enable(True)

    def see(arm: bool, gripper: bool) -> None:
        bench.now_ns += 50 * 10**6
        if arm:
            bench.server.receive(STATE, msgs.joints(bench.now_ns, [0.25, 0, 0], names=msgs.JOINTS[:3]))
        if gripper:
            bench.server.receive(STATE, msgs.joints(bench.now_ns, [0.04], names=msgs.JOINTS[3:]))
        image = msgs.picture(bench.now_ns // 10**6, 4)
        bench.server.receive(CAMERA, msgs.compressed(bench.now_ns, image))
        bench.server.expire()
        bench.answered()

    for _ in range(3):
        see(True, True)
    assert bench.reasons() == set() and bench.chunks[-1].actions[0, 0] == 0.25
    for _ in range(12):
        see(True, False)
    gripper = f"{STATE} (gripper_width, gripper_velocity)"
    status = bench.server.status()
    assert bench.reasons() == {HoldReason.STALE_STATE} and status.faults == {gripper: HoldReason.STALE_STATE}
    assert status.ages_ms[gripper] == 600 and status.ages_ms[f"{STATE} (x, y, z)"] == 0
    assert f"nearest message on {gripper}" in status.drops[DropReason.UNSYNCHRONISED].last
    assert status.received[STATE] == 18 and DropReason.INVALID_MESSAGE not in status.drops
    see(True, True)
    assert bench.reasons() == set()
    bench.server.receive(STATE, msgs.joints(bench.now_ns, [0.0], names=["wheel"]))
    assert "joint 'end_effector_x' is missing" in bench.server.status().drops[DropReason.INVALID_MESSAGE].last


def test_each_camera_must_be_fresh_and_alive_and_the_one_that_is_not_is_named() -> None:
    wrist = replace(CONTRACT.primary, name="wrist", topic="wrist/compressed")
    bench = Bench(replace(CONTRACT, cameras=(CONTRACT.primary, wrist)))
    bench.instruct()
    bench.server.enable(True)

    def see(picture: int | None) -> None:
        bench.now_ns += 50 * 10**6
        if picture is not None:
            bench.server.receive(wrist.topic, msgs.compressed(bench.now_ns, msgs.picture(picture, 4)))
        bench.see(advance_ms=0)
        bench.server.expire()
        bench.answered()

    for number in range(4):
        see(number)
    assert bench.server.tick().command is not None and bench.server.status().faults == {}
    for _ in range(22):
        see(7)
    assert bench.reasons() == {HoldReason.FROZEN_CAMERA}
    assert bench.server.status().faults == {wrist.topic: HoldReason.FROZEN_CAMERA}
    see(8)
    assert bench.server.tick().command is not None
    for _ in range(12):
        see(None)
    assert bench.server.status().faults == {wrist.topic: HoldReason.STALE_CAMERA}
    assert f"nearest message on {wrist.topic}" in bench.server.status().drops[DropReason.UNSYNCHRONISED].last
    see(9)
    assert bench.server.tick().command is not None


def test_without_a_robot_that_waits_a_frame_waits_for_its_state() -> None:
    for lossless, served in ((True, 2), (False, 1)):
        bench = Bench(lossless=lossless)
        bench.instruct()
        bench.see()
        bench.now_ns += 60 * 10**6
        stamp_ns = bench.now_ns
        bench.server.receive(CAMERA, msgs.compressed(stamp_ns, msgs.picture(1, 4)))
        bench.now_ns += 5 * 10**9
        bench.server.expire()
        bench.server.receive(STATE, msgs.joints(stamp_ns, [0.5, 0, 0, 0.04]))
        bench.answered()
        assert len(bench.chunks) == served
        assert [dropped.reason for dropped in bench.drops] == [DropReason.UNSYNCHRONISED] * (2 - served)


def test_a_clock_set_back_holds_once_and_recovers(bench: Bench) -> None:
    bench.moving()
    bench.now_ns -= 10**11
    assert HoldReason.CLOCK_JUMP in bench.reasons()
    for _ in range(3):
        bench.see()
        bench.answered()
    assert bench.server.tick().command is not None
    assert {reason: drops.count for reason, drops in bench.server.status().drops.items()} == {DropReason.CLOCK_JUMP: 1}


@pytest.mark.parametrize("topic", [CAMERA, STATE])
def test_a_clock_that_runs_ahead_is_seen(bench: Bench, topic: str) -> None:
    """Samples of 0.3 s ahead are old samples that look fresh."""
    bench.moving()
    ahead_ns = bench.now_ns + 300 * 10**6
    if topic == STATE:
        bench.server.receive(STATE, msgs.joints(ahead_ns, [0.25, 0, 0, 0.04]))
    else:
        bench.server.receive(CAMERA, msgs.compressed(ahead_ns, msgs.picture(5, 4)))
    assert HoldReason.FUTURE_STAMP in bench.reasons()
    assert bench.server.status().faults == {topic: HoldReason.FUTURE_STAMP}


def test_simulated_time_that_nobody_publishes_is_named(bench: Bench) -> None:
    bench.instruct()
    bench.now_ns = 0
    assert HoldReason.NO_CLOCK in bench.reasons()


def test_a_step_in_another_thread_does_not_look_like_a_clock_set_back() -> None:
    """`status` reads the clock; a control step that came in between, with a later time, must not end the plan."""
    bench = Bench()
    bench.moving()
    interrupting: list[threading.Thread] = []

    def clock() -> int:
        now_ns = bench.now_ns
        if interrupting == []:
            bench.now_ns += 10**6
            interrupting.append(threading.Thread(target=bench.server.tick))
            interrupting[0].start()
            interrupting[0].join(0.3)  # the step waits for the snapshot, or has overtaken it by now
        return now_ns

    bench.server._clock = clock
    assert bench.server.status().holding == ()
    interrupting[0].join()
    assert bench.server.tick().command is not None
