"""The policy server without ROS: gates, latch, queue modes, parity, and a soak."""

import math
import resource
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tests.core import ros_messages as msgs
from vla_policy.core.contract import ActionDimension, Contract, WorkspaceAxis, load_contract
from vla_policy.core.errors import DataError
from vla_policy.core.observation import Decision, Observation
from vla_policy.core.policy_config import ActionStats, NormStats, PolicyConfig
from vla_policy.core.safety import HoldReason
from vla_policy.core.server import PolicyServer, ServedChunk, ServerSettings, Step
from vla_policy.core.status import Latch, Status
from vla_policy.core.synchroniser import Dropped, DropReason
from vla_policy.core.worker import Answer, InferenceWorker

CONTRACT = load_contract(Path(__file__).parents[2] / "ros2_ws/src/vla_policy/config/libero.yaml")
CAMERA, STATE, INSTRUCTION = CONTRACT.primary.topic, CONTRACT.states[0].topic, CONTRACT.instruction.topic
TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class FakeConfig(PolicyConfig):
    """Of a policy that says itself how many of its rows are to be carried out."""

    carried_out: int

    @property
    def executed(self) -> int:
        return self.carried_out


class FakeActor:
    """Answers with the state's first value; waits for `gate` before each answer."""

    unnorm_key = "fake"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.error: Exception | None = None
        self.value: float | None = None
        self.rows: np.ndarray | None = None
        self.executed: int | None = None

    @property
    def config(self) -> PolicyConfig:
        stats = {"fake": NormStats(ActionStats((-1.0,) * 7, (1.0,) * 7, (True,) * 7), None)}
        rows = 1 if self.rows is None else len(np.atleast_2d(self.rows))
        told = {"norm_stats": stats, "num_images": 1, "image_size": 112, "takes_state": False, "raw": {}}
        return FakeConfig(**told, horizon=rows, steps_per_action=4, carried_out=self.executed or rows)

    def act(self, observation: Observation) -> Decision:
        self.entered.release()
        assert self.gate.wait(TIMEOUT_S)
        if self.error is not None:
            raise self.error
        if self.rows is not None:
            return Decision(np.zeros(self.rows.size, np.int64), self.rows)
        assert observation.state is not None
        x = observation.state[0] if self.value is None else self.value
        return Decision(np.zeros(7, np.int64), np.asarray([x, 0, 0, 0, 0, 0, 1.0]))


class Bench:
    """A server with a clock in the test's hand."""

    def __init__(self, contract: Contract = CONTRACT, **settings: object) -> None:
        self.now_ns = 10**12
        self.actor = FakeActor()
        self.chunks: list[ServedChunk] = []
        self.drops: list[Dropped] = []
        self.server = PolicyServer(
            contract,
            self.actor,
            ServerSettings(**settings),  # type: ignore[arg-type]  # keywords of mixed types
            lambda: self.now_ns,
            self.chunks.append,
            self.drops.append,
        )
        self.server.activate()

    def instruct(self, text: str = "go") -> None:
        self.server.receive(INSTRUCTION, msgs.text(text))

    def see(self, x: float = 0.25, advance_ms: int = 50, picture: int | None = None) -> None:
        self.now_ns += advance_ms * 10**6
        self.server.receive(STATE, msgs.joints(self.now_ns, [x, 0, 0, 0.04]))
        image = msgs.picture(self.now_ns // 10**6 if picture is None else picture, 4)
        self.server.receive(CAMERA, msgs.compressed(self.now_ns, image))

    def answered(self) -> None:
        assert self.server.drain(TIMEOUT_S)

    def reasons(self) -> set[HoldReason]:
        return set(self.server.tick().reasons)

    def moving(self) -> "Bench":
        self.instruct()
        self.see()
        self.answered()
        self.server.enable(True)
        self.see()
        self.answered()
        assert self.server.tick().command is not None
        return self

    def start_again(self) -> None:
        """An operator's start, after which the next decision moves the robot."""
        assert self.server.start() is None
        self.see()
        self.answered()
        assert self.server.tick().command is not None


@pytest.fixture
def bench() -> Bench:
    return Bench()


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
    bench.actor.gate.clear()
    bench.see()
    bench.now_ns += 550 * 10**6
    bench.actor.gate.set()
    bench.answered()
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
    bench.actor.gate.clear()
    bench.see()
    bench.now_ns += 550 * 10**6
    bench.actor.gate.set()
    bench.answered()
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


def test_the_first_of_two_stops_is_the_one_that_is_named(bench: Bench) -> None:
    bench.server.stop(Latch("e-stop"))
    bench.server.stop(Latch("operator"))
    assert bench.server.status().latch == Latch("e-stop")


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


def test_the_same_instruction_again_does_not_interrupt(bench: Bench) -> None:
    bench.moving()
    bench.instruct()
    assert bench.server.tick().command is not None


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


def test_a_clock_set_back_holds_once_and_recovers(bench: Bench) -> None:
    bench.moving()
    bench.now_ns -= 10**11
    assert HoldReason.CLOCK_JUMP in bench.reasons()
    for _ in range(3):
        bench.see()
        bench.answered()
    assert bench.server.tick().command is not None
    assert {reason: drops.count for reason, drops in bench.server.status().drops.items()} == {DropReason.CLOCK_JUMP: 1}


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


def test_silence_is_never_seen_as_a_mere_disabling(bench: Bench) -> None:
    """Whoever polls while the server ends must find the cause, not only that output is off."""
    bench.moving()
    seen: list[Status] = []
    done = threading.Event()

    def poll() -> None:
        while not done.is_set():
            seen.append(bench.server.status())

    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(poll)
        bench.server.silence()
        done.set()
        polling.result(TIMEOUT_S)
    assert all(status.active == status.enabled for status in [*seen, bench.server.status()])
    assert not bench.server.status().active


def test_a_motion_ends_with_the_contract_s_holds_and_then_silence(bench: Bench) -> None:
    """Whoever takes the arm over after a stop is not fought: four holds of zero velocity, then nothing."""
    bench.moving()
    bench.server.stop(Latch("button"))
    sent = [bench.server.tick().command for _ in range(8)]
    assert [command is not None for command in sent] == [True] * 4 + [False] * 4
    assert all(not command.motion.any() and command.gripper_m is None for command in sent if command is not None)
    bench.server.enable(False)
    assert bench.server.tick().command is None, "a second reason to hold ends no second motion"


@pytest.mark.parametrize("end", ["disable", "finish", "silence", "stale"])
def test_every_end_of_a_motion_is_a_hold(bench: Bench, end: str) -> None:
    bench.moving()
    if end == "stale":
        bench.now_ns += 10**9
    else:
        {"disable": lambda: bench.server.enable(False), "finish": bench.server.finish, "silence": bench.server.silence}[
            end
        ]()
    halt = bench.server.last_halt()
    assert halt is not None and not halt.motion.any()


def test_nothing_is_sent_where_nothing_was_commanded(bench: Bench) -> None:
    bench.instruct()
    bench.server.enable(True)
    assert [bench.server.tick().command for _ in range(3)] == [None] * 3
    assert bench.server.last_halt() is None


def test_holds_go_on_where_the_contract_asks_for_it() -> None:
    endless = replace(CONTRACT, action=replace(CONTRACT.action, hold_commands=0))
    bench = Bench(endless).moving()
    bench.server.stop(Latch("button"))
    assert all(bench.server.tick().command is not None for _ in range(20))


def test_a_fault_that_lasts_disarms(bench: Bench) -> None:
    """The camera comes back after a coffee: the arm must not go on by itself."""
    bench.moving()
    bench.now_ns += 10**9
    assert HoldReason.NOT_STARTED not in bench.reasons(), "a short fault is no reason to ask somebody"
    bench.see()
    bench.answered()
    assert bench.server.tick().command is not None
    for _ in range(7):
        bench.now_ns += 10**9
        bench.server.tick()
    bench.see()
    bench.answered()
    assert bench.reasons() == {HoldReason.NOT_STARTED}
    bench.start_again()


def test_short_faults_do_not_add_up_and_waiting_for_a_task_is_none(bench: Bench) -> None:
    bench.moving()
    for _ in range(3):
        for _ in range(4):
            bench.now_ns += 10**9
            bench.server.tick()
        bench.see()
        bench.answered()
        assert bench.server.tick().command is not None
    bench.instruct("")
    for _ in range(100):
        bench.see(advance_ms=200)
        assert bench.reasons() == {HoldReason.NO_INSTRUCTION}
    bench.instruct()
    bench.see()
    bench.answered()
    assert bench.server.tick().command is not None


def test_a_fault_is_timed_by_the_clock_that_goes_on(bench: Bench) -> None:
    bench.moving()
    bench.now_ns += 10**9
    assert bench.reasons() == {HoldReason.STALE_CAMERA, HoldReason.STALE_STATE}
    bench.now_ns -= 10**11
    for _ in range(7):
        bench.server.tick()
        bench.now_ns += 10**9
    assert not bench.server.status().started


@pytest.mark.parametrize("fault", ["sensors", "clock of the camera"])
def test_a_plan_does_not_go_on_after_a_fault(bench: Bench, fault: str) -> None:
    """What was planned before it is not what is to be done after, however short it was."""
    bench.moving()
    bench.actor.gate.clear()
    if fault == "sensors":
        bench.now_ns += 510 * 10**6
        assert HoldReason.STALE_CAMERA in bench.reasons()
    else:
        bench.server.receive(CAMERA, msgs.compressed(bench.now_ns - 2 * 10**9, msgs.picture(1, 4)))
    bench.see()
    assert bench.reasons() == {HoldReason.NO_CHUNK}
    bench.actor.gate.set()
    bench.answered()
    assert bench.server.tick().command is not None


def test_after_a_hold_the_arm_starts_gently() -> None:
    slow = tuple(replace(item, slew=None if item.slew is None else 10.0) for item in CONTRACT.action.dimensions)
    bench = Bench(replace(CONTRACT, action=replace(CONTRACT.action, dimensions=slow)))
    bench.actor.value = 1.0
    bench.moving()
    bench.see()
    bench.answered()
    step = bench.server.tick()
    assert step.command is not None and step.command.motion[0] == 1.0
    bench.actor.gate.clear()
    for _ in range(30):
        bench.see()
        step = bench.server.tick()
    assert step == Step(None, (HoldReason.NO_CHUNK,)), "it came to rest"
    bench.actor.gate.set()
    bench.answered()
    bench.see()
    bench.answered()
    step = bench.server.tick()
    assert step.command is not None and step.command.motion[0] == pytest.approx(0.5)


def test_the_workspace_counts_the_way_since_the_measurement() -> None:
    border = WorkspaceAxis("linear.x", "x", -1.0, 0.3)
    bench = Bench(replace(CONTRACT, action=replace(CONTRACT.action, workspace=(border,))))
    bench.actor.value = 1.0
    bench.moving()
    velocities = []
    for age_ms in (0, 50, 150):
        bench.see(0.27)
        bench.answered()
        bench.now_ns += age_ms * 10**6
        step = bench.server.tick()
        assert step.command is not None
        velocities.append(step.command.motion[0])
    # 3 cm to the border; the arm moves for one period of 50 ms, and has moved since it was measured.
    assert velocities == pytest.approx([0.03 / 0.05, 0.03 / 0.1, 0.03 / 0.2])


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


JOINTS = tuple(ActionDimension(f"q{k}", f"joint{k}", "rad", 1.0, 0.0, -2.0, 2.0, 1.0) for k in range(2))
GRIPPER_CHOICE = CONTRACT.action.dimensions[-1]


class Arm(Bench):
    """Position control of two joints that are measured beside the policy's state."""

    def __init__(self) -> None:
        action = replace(CONTRACT.action, command="joint_trajectory", dimensions=(*JOINTS, GRIPPER_CHOICE))
        super().__init__(replace(CONTRACT, action=action))
        self.actor.rows = np.asarray([[1.5, -1.5, 1.0]])
        self.joints = [0.0, 0.0]

    def see(self, x: float = 0.25, advance_ms: int = 50, picture: int | None = None) -> None:
        self.now_ns += advance_ms * 10**6
        names = (*msgs.JOINTS, "joint0", "joint1")
        message = msgs.joints(self.now_ns, [x, 0, 0, 0.04, *self.joints], names=names)
        self.server.receive(STATE, message)
        self.server.receive(CAMERA, msgs.compressed(self.now_ns, msgs.picture(self.now_ns // 10**6, 4)))

    def step(self) -> np.ndarray | None:
        """The next command's positions, which the arm reaches."""
        self.see()
        self.answered()
        command = self.server.tick().command
        if command is not None:
            self.joints = command.motion.tolist()
        return None if command is None else command.motion


def test_an_arm_that_was_moved_by_hand_starts_where_it_is() -> None:
    arm = Arm()
    arm.moving()
    for _ in range(5):
        arm.step()
    arm.server.enable(False)
    for _ in range(6):
        arm.step()
    arm.joints = [-1.0, 1.0]  # by hand
    assert arm.step() is None, "nobody is fought"
    arm.server.enable(True)
    first = arm.step()
    assert first is not None
    np.testing.assert_allclose(first, [-0.95, 0.95], err_msg="a slew's step from where the arm is")


def test_a_latched_stop_holds_what_was_measured() -> None:
    arm = Arm()
    arm.moving()
    for _ in range(5):
        arm.step()
    arm.joints = [0.2, -0.2]  # the arm lags behind what was commanded
    arm.see()
    arm.server.stop(Latch("button"))
    halts = [arm.server.tick().command for _ in range(6)]
    assert [halt is None for halt in halts] == [False] * 4 + [True] * 2
    arm.joints = [1.0, 1.0]  # guided by hand: nothing answers
    arm.see()
    assert arm.server.tick().command is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_raises_is_held_for_good(bench: Bench) -> None:
    bench.moving()
    bench.actor.error = RuntimeError("defect")
    failed: Callable[[], bool] = lambda: bench.server.status().latch is not None  # noqa: E731  # shorter than a def here
    bench.see()
    waiter = threading.Event()
    for _ in range(200):
        if failed() or waiter.wait(0.05):
            break
    assert "the engine failed" in str(bench.server.status().latch)


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
