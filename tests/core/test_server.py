"""The policy server without ROS: what must be there before it moves, and what latches."""

import resource
import threading

import numpy as np
import pytest

from tests.core import ros_messages as msgs
from tests.core.server_bench import CAMERA, STATE, Bench
from vla_policy.core.errors import DataError
from vla_policy.core.safety import HoldReason
from vla_policy.core.status import Latch
from vla_policy.core.synchroniser import DropReason


def test_dry_run_answers_and_holds(bench: Bench) -> None:
    bench.instruct()
    bench.see(0.5)
    bench.answered()
    assert bench.chunks[0].actions[0, 0] == 0.5 and bench.chunks[0].usable
    assert bench.reasons() == {HoldReason.DISABLED, HoldReason.NOT_STARTED}


def test_motion_holds_when_each_thing_is_missing(bench: Bench) -> None:
    bench.moving()
    bench.now_ns += 600 * 10**6
    assert bench.reasons() == {HoldReason.STALE_CAMERA, HoldReason.STALE_STATE}
    bench.see()
    bench.answered()
    assert bench.server.tick().command is not None
    bench.instruct("")
    assert bench.reasons() == {HoldReason.NO_INSTRUCTION}


def test_stop_latches_until_reset_and_start(bench: Bench) -> None:
    bench.moving()
    bench.server.stop(Latch("operator"))
    assert bench.reasons() == {HoldReason.STOP_LATCHED}
    assert bench.server.start() == "a stop is latched (operator); reset it first"
    bench.server.reset()
    assert bench.reasons() == {HoldReason.NOT_STARTED}
    bench.start_again()


def test_enable_does_not_lift_a_latched_stop(bench: Bench) -> None:
    bench.moving()
    bench.server.stop(Latch("operator"))
    bench.server.enable(False)
    bench.server.enable(True)
    assert HoldReason.STOP_LATCHED in bench.reasons()
    bench.server.reset()
    assert bench.reasons() == {HoldReason.NOT_STARTED}


def test_the_first_of_two_stops_is_the_one_that_is_named(bench: Bench) -> None:
    bench.server.stop(Latch("e-stop"))
    bench.server.stop(Latch("operator"))
    assert bench.server.status().latch == Latch("e-stop")


@pytest.mark.parametrize("way", ["enable", "stop", "stopped", "finish"])
def test_no_motion_begins_with_a_plan_from_before(bench: Bench, way: str) -> None:
    """Not even one step later, and without a control step in between that could have forgotten it."""
    bench.moving()
    if way == "enable":
        bench.server.enable(True)
    elif way == "finish":
        bench.server.finish()
    else:
        bench.server.stop(Latch("operator"))
        if way == "stopped":  # decided while the stop is latched
            bench.see()
            bench.answered()
        bench.server.reset()
    assert bench.server.start() is None
    assert bench.reasons() == {HoldReason.NO_CHUNK}
    bench.see()
    bench.answered()
    assert bench.server.tick().command is not None


def test_an_action_that_is_not_finite_latches(bench: Bench) -> None:
    bench.moving()
    bench.actor.value = float("nan")
    bench.see()
    bench.answered()
    latch = bench.server.status().latch
    assert latch is not None and latch.engine_failed
    assert latch.reason.startswith("the engine failed: action: 1 of 7 values are not finite")
    assert [dropped.reason for dropped in bench.drops] == [DropReason.ENGINE_ERROR] and len(bench.chunks) == 2
    bench.actor.value = None
    bench.see()
    bench.answered()
    assert len(bench.chunks) == 3, "the worker lives; only the operator takes the latch back"
    assert HoldReason.STOP_LATCHED in bench.reasons()
    assert bench.server.reset() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_raises_is_held_for_good(bench: Bench) -> None:
    bench.moving()
    bench.actor.error = RuntimeError("defect")
    bench.see()
    waiter = threading.Event()
    for _ in range(200):
        if bench.server.status().latch is not None or waiter.wait(0.05):
            break
    assert "the engine failed" in str(bench.server.status().latch)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_not_reset(bench: Bench) -> None:
    bench.moving()
    bench.actor.error = RuntimeError("defect")
    bench.see()
    waiter = threading.Event()
    while (refused := bench.server.reset()) is None:
        assert not waiter.wait(0.01)
        bench.see()
    assert "clean up, configure and activate again" in refused


def test_a_run_keeps_its_instruction(bench: Bench) -> None:
    bench.moving()
    bench.server.claim("sort the screws")
    for text in ("something else", ""):
        bench.instruct(text)
        assert bench.server.status().instruction == "sort the screws"
    assert bench.server.status().drops[DropReason.INSTRUCTION_CLAIMED].count == 2
    with pytest.raises(DataError, match="a run has its own instruction"):
        bench.server.instruct("no")
    bench.server.finish()
    assert bench.server.status().instruction == "", "the topic took it away meanwhile"
    bench.instruct("back")
    bench.server.claim("again")
    bench.server.finish()
    assert bench.server.status().instruction == "back"


def test_the_same_instruction_again_does_not_interrupt(bench: Bench) -> None:
    bench.moving()
    bench.instruct()
    assert bench.server.tick().command is not None


def test_thirty_minutes_at_30_hz_need_no_more_memory() -> None:
    """54,000 frames of a run, as fast as they go: counters and windows are bounded."""
    bench = Bench()
    bench.moving()
    image = msgs.png(msgs.picture(0, 4))

    def run(frames: int) -> None:
        for index in range(frames):
            bench.now_ns += 33_333_333
            bench.server.receive(STATE, msgs.joints(bench.now_ns, [0.25, 0, 0, 0.04]))
            data = np.frombuffer(image + index.to_bytes(4, "big"), np.uint8)
            message = msgs.make("sensor_msgs/msg/CompressedImage", msgs.header(bench.now_ns), "png", data)
            bench.server.receive(CAMERA, message)
            bench.server.tick()
            bench.chunks.clear()
            bench.drops.clear()
            if index % 300 == 0:
                bench.answered()
                bench.server.status()

    run(9_000)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(45_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 4_096
