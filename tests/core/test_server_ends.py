"""How the policy server ends a motion, what it does during a fault, and how it begins again."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from tests.core import ros_messages as msgs
from tests.core.server_bench import CAMERA, CONTRACT, STATE, TIMEOUT_S, Bench
from vla_policy.core.contract import ActionDimension, WorkspaceAxis
from vla_policy.core.safety import HoldReason
from vla_policy.core.server import Step
from vla_policy.core.status import Latch, Status


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
