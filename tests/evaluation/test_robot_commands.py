"""Lockstep: simulated time waits for decisions and commands, also late ones, and says which did not come."""

import threading
from collections.abc import Callable

import pytest

from evaluation.robot.commands import Commands
from vla_policy.core.errors import ContractError

STEP_NS = 50_000_000
TWIST = {"linear.x": 0.5}


def started(wait: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def still_waits(thread: threading.Thread) -> bool:
    thread.join(0.1)  # twice what a command is waited for behind one that did not come
    return thread.is_alive()


def test_a_late_command_is_waited_for_until_motion_and_gripper_are_there() -> None:
    """Neither the command of the instant before nor half a command will do."""
    commands = Commands()
    commands.grip(0.01)
    commands.move({"linear.x": 0.1}, STEP_NS, STEP_NS)
    waiting = started(lambda: commands.await_command(2 * STEP_NS, gripped=1))
    assert still_waits(waiting)
    commands.move({"linear.x": 0.2}, 2 * STEP_NS, STEP_NS)
    assert still_waits(waiting), "a command that was sent before the clock's last step"
    commands.move(TWIST, 2 * STEP_NS, 2 * STEP_NS)
    assert still_waits(waiting), "no gripper yet"
    commands.grip(0.04)
    waiting.join()
    assert commands.missed == 0
    assert commands.twist(2 * STEP_NS, 10 * STEP_NS) == TWIST and commands.opening_m == 0.04


def test_a_robot_without_a_gripper_waits_for_motion_alone() -> None:
    commands = Commands()
    waiting = started(lambda: commands.await_command(STEP_NS, gripped=None))
    assert still_waits(waiting)
    commands.move(TWIST, STEP_NS, STEP_NS)
    waiting.join()
    assert commands.missed == 0


def test_who_is_silent_is_waited_for_once_and_each_step_without_a_command_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock on which everything that is not there comes too late."""
    limits_s: list[float | None] = []

    def too_late(self: threading.Condition, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        limits_s.append(timeout)
        return predicate()

    monkeypatch.setattr(threading.Condition, "wait_for", too_late)
    commands = Commands()
    for instant in (1, 2, 3, 4, 5):
        if instant == 4:
            commands.move(TWIST, 4 * STEP_NS, 4 * STEP_NS)
        commands.await_command(instant * STEP_NS, gripped=None)
    assert limits_s == [5.0, 0.05, 0.05, 0.05, 5.0] and commands.missed == 4
    commands.forget()
    commands.await_command(6 * STEP_NS, gripped=None)
    assert limits_s[-1] == 5.0 and commands.missed == 1, "of the next episode"


def test_what_was_said_holds_for_its_time_and_for_its_episode() -> None:
    commands = Commands()
    assert commands.twist(STEP_NS, STEP_NS) == {} and commands.opening_m is None
    commands.move(TWIST, STEP_NS, STEP_NS)
    commands.grip(0.04)
    assert commands.twist(2 * STEP_NS, STEP_NS) == TWIST
    assert commands.twist(2 * STEP_NS + 1, STEP_NS) == {}, "the robot stands still"
    commands.forget()
    assert commands.twist(STEP_NS, STEP_NS) == {} and commands.opening_m is None


def test_a_decision_is_waited_for_and_its_absence_is_a_mistake() -> None:
    commands = Commands()
    waiting = started(lambda: commands.await_decision(2 * STEP_NS))
    commands.decided(STEP_NS)
    assert still_waits(waiting), "a decision on another image"
    commands.decided(2 * STEP_NS)
    waiting.join()
    with pytest.raises(
        ContractError, match=r"no decision on the image of 150000000 ns within 0\.01 s; is the policy node active"
    ):
        Commands(decision_s=0.01).await_decision(3 * STEP_NS)


def test_closing_ends_every_wait() -> None:
    commands = Commands(decision_s=600, command_s=600)
    threads = [
        started(lambda: commands.await_decision(STEP_NS)),
        started(lambda: commands.await_command(STEP_NS, gripped=0)),
    ]
    assert all(map(still_waits, threads))
    commands.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
