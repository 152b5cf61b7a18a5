"""The policy server's decisions: which of them move the robot, in which order, and how long they took."""

import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.core import ros_messages as msgs
from tests.core.server_bench import CAMERA, CONTRACT, INSTRUCTION, STATE, TIMEOUT_S, Bench, FakeActor
from vla_policy.core.errors import DataError
from vla_policy.core.observation import Decision
from vla_policy.core.safety import HoldReason
from vla_policy.core.synchroniser import Dropped, DropReason
from vla_policy.core.worker import Answer, InferenceWorker


def test_a_chunk_runs_out(bench: Bench) -> None:
    bench.moving()
    for _ in range(5):  # three further control steps, and two of grace
        bench.now_ns += 50 * 10**6
        assert bench.server.tick().reasons == ()
    bench.now_ns += 50 * 10**6
    assert bench.reasons() == {HoldReason.NO_CHUNK}
    assert bench.server.status().holding == (HoldReason.NO_CHUNK,)


def test_a_new_task_forgets_the_old_one_s_plan(bench: Bench) -> None:
    bench.moving()
    bench.instruct("something else")
    assert bench.reasons() == {HoldReason.NO_CHUNK}


def test_a_task_that_the_policy_cannot_take_is_a_fault_until_another_comes(bench: Bench) -> None:
    """By topic it ends the former one, and is told once, not with every frame; asked by service it is refused."""
    bench.moving()
    bench.instruct("go " * 60)
    step = bench.server.tick()
    assert step.reasons == (HoldReason.REFUSED_INSTRUCTION,) and step.command is not None
    assert step.command.motion.tolist() == [0.0] * 6
    for _ in range(5):
        bench.see()
        bench.answered()
        assert bench.reasons() == {HoldReason.REFUSED_INSTRUCTION}
    status = bench.server.status()
    assert status.drops[DropReason.INVALID_MESSAGE].count == 1 and DropReason.ENGINE_ERROR not in status.drops
    assert "the prompt has 179 ids, the policy takes 100" in status.drops[DropReason.INVALID_MESSAGE].last
    assert status.faults == {INSTRUCTION: HoldReason.REFUSED_INSTRUCTION} and status.instruction == ""
    bench.instruct("")
    assert bench.reasons() == {HoldReason.NO_INSTRUCTION}
    bench.instruct("go on")
    bench.see()
    bench.answered()
    assert bench.server.tick().command is not None
    for way in (bench.server.instruct, bench.server.claim):
        with pytest.raises(DataError, match="the prompt has 179 ids, the policy takes 100; shorten it"):
            way("go " * 60)
    assert bench.server.status().instruction == "go on" and bench.reasons() == set()


def test_a_plan_that_ends_before_the_next_comes_is_counted(bench: Bench) -> None:
    """Once for each time, however long it lasts."""
    bench.moving()
    assert bench.server.status().run_out == 0
    for times in (1, 2):
        for _ in range(12):  # 600 ms: four control steps of the action, its grace, and more
            bench.now_ns += 50_000_000
            bench.server.tick()
        assert bench.server.status().run_out == times
        bench.see()
        bench.answered()
        assert bench.server.tick().command is not None


def test_an_answer_to_a_former_task_does_not_move(bench: Bench) -> None:
    bench.moving()
    bench.actor.gate.clear()
    bench.see()
    bench.instruct("something else")
    bench.actor.gate.set()
    bench.answered()
    assert not bench.chunks[-1].usable and bench.reasons() == {HoldReason.NO_CHUNK}


def test_a_late_decision_does_not_move(bench: Bench) -> None:
    bench.moving()
    bench.answered_late()
    bench.server.receive(STATE, msgs.joints(bench.now_ns, [0, 0, 0, 0.04]))
    assert not bench.chunks[-1].usable
    assert HoldReason.STALE_CAMERA in bench.reasons() and bench.server.status().late == 1


@pytest.mark.parametrize(
    ("blending", "expected"),
    [
        # Control steps of 50 ms, rows of 4 steps. The second chunk's rows are 0.1 above the first one's, which it
        # follows by 4 steps; both were decided at once, so no row was due meanwhile.
        ("latest", 0.3),
        ("ensemble", (0.2 + 0.3 * math.exp(-0.1)) / (1 + math.exp(-0.1))),
        # Real-time chunking's weight of the first of 4 shared steps: progress 4/5.
        ("soft_mask", 0.3 - 0.1 * 0.8 * math.expm1(0.8) / math.expm1(1.0)),
    ],
)
def test_chunks_follow_each_other_as_told(blending: str, expected: float) -> None:
    bench = Bench(blending=blending)
    bench.instruct()
    bench.server.enable(True)
    column = np.asarray([[0.1], [0.2]])
    bench.actor.rows = np.hstack([column, np.zeros((2, 5)), np.ones((2, 1))])
    bench.see()
    bench.answered()
    assert (bench.chunks[0].actions[:, 0] == [0.1, 0.2]).all()
    step = bench.server.tick()
    assert step.command is not None and step.command.motion[0] == pytest.approx(0.1)
    bench.actor.rows = np.hstack([column + 0.2, np.zeros((2, 5)), np.ones((2, 1))])
    for _ in range(3):
        bench.now_ns += 50 * 10**6
        assert bench.server.tick().command is not None
    bench.see()
    bench.answered()
    step = bench.server.tick()
    assert step.command is not None and step.command.motion[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("contract_rows", "policy_rows", "expected"), [(1, None, 1), (0, 1, 1), (2, 1, 2), (0, None, 2)]
)
def test_only_as_many_actions_of_a_chunk_are_carried_out_as_contract_or_policy_say(
    contract_rows: int, policy_rows: int | None, expected: int
) -> None:
    """The contract's word counts where it has one."""
    bench = Bench(replace(CONTRACT, action=replace(CONTRACT.action, chunk_rows=contract_rows)))
    bench.actor.rows = np.hstack([[[0.1], [0.2]], np.zeros((2, 5)), np.ones((2, 1))])
    bench.actor.executed = policy_rows
    bench.moving()
    bench.actor.gate.clear()
    found = []
    for _ in range(12):
        bench.see()
        step = bench.server.tick()
        found.append(None if step.reasons else step.command)
    assert {command.motion[0] for command in found if command} == {0.1, 0.2} - ({0.2} if expected == 1 else set())
    bench.actor.gate.set()
    assert found[-1] is None


def test_a_refused_observation_is_counted_and_the_next_served(bench: Bench) -> None:
    bench.moving()
    bench.actor.error = DataError("cannot")
    bench.see()
    bench.answered()
    bench.actor.error = None
    bench.see()
    bench.answered()
    assert [dropped.reason for dropped in bench.drops] == [DropReason.ENGINE_ERROR]
    assert bench.server.tick().command is not None


def test_a_decision_that_took_too_long_does_not_move_though_the_clock_stood_still() -> None:
    """Simulated time may stand while the engine computes."""
    bench = Bench(inference_deadline_s=1e-9)
    bench.instruct()
    bench.see()
    bench.answered()
    assert bench.chunks[0].age_ms == 0.0 and bench.chunks[0].latency_ms > 1e-6
    assert not bench.chunks[0].usable and bench.server.status().late == 1


def test_that_no_chunk_came_in_time_is_the_reason_that_is_given(bench: Bench) -> None:
    bench.moving()
    bench.answered_late()
    bench.actor.gate.clear()
    bench.see(advance_ms=300)  # the plan before is too old by now
    assert bench.reasons() == {HoldReason.DEADLINE_MISSED}
    bench.actor.gate.set()
    bench.answered()
    assert bench.server.tick().command is not None, "a decision in time ends it"


def test_an_answer_after_the_end_of_service_is_not_usable(bench: Bench) -> None:
    bench.moving()
    bench.actor.gate.clear()
    bench.see()
    bench.server.silence()
    bench.actor.gate.set()
    bench.answered()
    assert not bench.chunks[-1].usable
    count = len(bench.chunks)
    bench.see()
    bench.answered()
    assert len(bench.chunks) == count, "frames are not even asked about"


def test_overhead_is_neither_the_engine_s_time_nor_that_of_the_frame_before(bench: Bench) -> None:
    bench.instruct()
    bench.see()
    bench.answered()
    frame, other = bench.chunks[0].frame, Bench()
    other.now_ns = frame.received_ns + 50 * 10**6
    other.server._answered(Answer(frame, Decision(np.zeros(7, np.int64), np.zeros(7)), 12.0, 30.0))
    assert other.server.status().overhead_ms.maximum == pytest.approx(50.0 - 12.0 - 30.0)


def test_a_frame_s_wait_for_the_engine_is_measured(bench: Bench) -> None:
    answers: list[Answer] = []
    drops: list[Dropped] = []
    bench.instruct()
    bench.see()
    bench.answered()
    frame, actor = bench.chunks[0].frame, FakeActor()
    worker = InferenceWorker(CONTRACT, actor, True, 3, answers.append, drops.append, pytest.fail)
    worker.start()
    actor.gate.clear()
    worker.submit(frame)
    assert actor.entered.acquire(timeout=TIMEOUT_S)
    worker.submit(frame)
    began = time.perf_counter()
    assert not threading.Event().wait(0.03)
    waited_ms = (time.perf_counter() - began) * 1e3
    actor.gate.set()
    assert worker.drain(TIMEOUT_S) and worker.stop(TIMEOUT_S) and drops == []
    first, second = answers
    assert first.queued_ms == 0.0 and second.queued_ms >= waited_ms


def test_a_drop_s_particulars_survive_more_frequent_drops(bench: Bench) -> None:
    bench.moving()
    bench.now_ns += 50 * 10**6
    bench.server.receive(STATE, msgs.joints(bench.now_ns, [0, 0, 0], names=msgs.JOINTS[:3]))
    bench.server.receive(STATE, msgs.joints(bench.now_ns, [0, float("nan"), 0, 0.04]))
    for _ in range(4):
        bench.now_ns += 50 * 10**6
        bench.server.receive(CAMERA, msgs.compressed(bench.now_ns, msgs.picture(bench.now_ns // 10**6, 4)))
        bench.now_ns += 200 * 10**6
        bench.server.expire()
    bench.server.lost(CAMERA, 3)
    drops = bench.server.status().drops
    assert (
        drops[DropReason.INVALID_MESSAGE].count == 2
        and "state y is not finite" in drops[DropReason.INVALID_MESSAGE].last
    )
    assert drops[DropReason.UNSYNCHRONISED].count >= 3 and "nearest message on" in drops[DropReason.UNSYNCHRONISED].last
    assert drops[DropReason.LOST_IN_TRANSPORT].count == 3


def test_the_newest_frame_replaces_the_waiting_one_and_is_counted(bench: Bench) -> None:
    bench.instruct()
    bench.actor.gate.clear()
    bench.see(0.0)
    assert bench.actor.entered.acquire(timeout=TIMEOUT_S)
    for x in (1.0, 2.0, 3.0):
        bench.see(x)
    bench.actor.gate.set()
    bench.answered()
    assert [chunk.actions[0, 0] for chunk in bench.chunks] == [0.0, 3.0]
    assert [dropped.reason for dropped in bench.drops] == [DropReason.SUPERSEDED] * 2


def test_lossless_answers_all_in_order_and_names_what_does_not_fit() -> None:
    bench = Bench(lossless=True, queue_size=3)
    bench.instruct()
    bench.actor.gate.clear()
    bench.see(0.0)
    assert bench.actor.entered.acquire(timeout=TIMEOUT_S)
    for x in (1.0, 2.0, 3.0, 4.0):
        bench.see(x)
    bench.actor.gate.set()
    bench.answered()
    assert [chunk.actions[0, 0] for chunk in bench.chunks] == [0.0, 1.0, 2.0, 3.0]
    assert [dropped.reason for dropped in bench.drops] == [DropReason.QUEUE_FULL]


def test_deactivate_reports_what_was_waiting() -> None:
    bench = Bench(lossless=True)
    bench.instruct()
    bench.actor.gate.clear()
    bench.see(0.0)
    assert bench.actor.entered.acquire(timeout=TIMEOUT_S)
    bench.see(1.0)
    threading.Timer(0.1, bench.actor.gate.set).start()
    assert bench.server.deactivate()
    assert [dropped.reason for dropped in bench.drops] == [DropReason.STOPPED]
    assert HoldReason.INACTIVE in bench.reasons()
