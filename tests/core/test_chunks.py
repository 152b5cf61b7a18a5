"""Chunk execution against the definitions of temporal ensembling and real-time chunking, and by counting steps."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_policy.core.chunks import Chunk, ChunkExecutor
from vla_policy.core.errors import DataError

PERIOD_NS = 50_000_000


class Robot:
    """Control steps of one period; `step` carries out what is due. Times in control periods."""

    def __init__(
        self, blending: str = "latest", grace: float = 0.0, discrete: tuple[int, ...] = (), deadline: int = 20
    ) -> None:
        self.executor = ChunkExecutor(
            PERIOD_NS, round(grace * PERIOD_NS), deadline * PERIOD_NS, discrete, blending, decay=0.5
        )

    def see(self, observed: float, rows: list[list[float]]) -> None:
        self.executor.submit(Chunk.of(round(observed * PERIOD_NS), np.asarray(rows), 1))

    def step(self, at: float, held: bool = False) -> list[float] | None:
        action = None if held else self.executor.action(round(at * PERIOD_NS))
        if action is None:
            return None
        self.executor.carried_out(round(at * PERIOD_NS))
        return action.tolist()


def plan(start: float, count: int) -> list[list[float]]:
    return [[start + index] for index in range(count)]


def test_a_held_action_lasts_its_steps_from_the_next_one_on() -> None:
    robot = Robot()
    robot.executor.submit(Chunk.of(0, np.asarray([7.0]), 4))
    assert [robot.step(at) for at in (19, 20, 21, 22, 23)] == [[7.0]] * 4 + [None]


def test_rows_follow_each_other_step_by_step_whatever_the_clock_does() -> None:
    robot = Robot()
    robot.see(0, plan(0, 4))
    assert [robot.step(at) for at in (1.0, 2.9, 3.0, 7.0, 8.0)] == [[0.0], [1.0], [2.0], [3.0], None]


def test_a_hold_uses_up_no_row() -> None:
    robot = Robot()
    robot.see(0, plan(0, 3))
    assert [robot.step(at, held=at in (2, 3)) for at in (1, 2, 3, 4)] == [[0.0], None, None, [1.0]]


def test_the_next_chunk_goes_on_where_the_robot_is() -> None:
    """Observed at 2.5, decided at 6: steps 3 to 6 were carried out meanwhile, so its fifth row is next."""
    robot = Robot()
    robot.see(0, plan(0, 20))
    assert [robot.step(at) for at in range(1, 7)] == plan(0, 6)
    robot.see(2.5, plan(100, 20))
    assert [robot.step(at) for at in (7, 8)] == [[104.0], [105.0]]


def test_a_slow_policy_s_first_chunk_begins_with_its_first_row() -> None:
    """An inference of many periods, during which the robot stood still: nothing of the plan has gone by."""
    robot = Robot()
    robot.see(0, plan(0, 3))
    assert [robot.step(at) for at in (16, 17, 18, 19)] == [*plan(0, 3), None]


def test_a_chunk_that_was_carried_out_by_the_older_one_is_not_repeated() -> None:
    robot = Robot(grace=1.0)
    robot.see(0, plan(0, 6))
    assert [robot.step(at) for at in range(1, 6)] == plan(0, 5)
    robot.see(1.5, plan(100, 3))
    assert robot.step(6) == [5.0], "the older plan goes on: four steps since the look, three rows"


@given(st.integers(2, 30), st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=12))
def test_every_step_carries_out_the_row_of_its_own_number(length: int, looks: list[tuple[int, bool]]) -> None:
    """The ideal by definition: k steps after a look, row k of the newest chunk. Looks overlap with thinking."""
    robot, now, steps = Robot(deadline=1000), 0.0, 0
    thinking: tuple[float, int, int] | None = None  # when it looked, how many steps were carried out then, its name
    newest: tuple[int, int] | None = None
    for name, (pause, blocked) in enumerate(looks):
        if thinking is not None:
            looked, before, who = thinking
            robot.see(looked, [[1000.0 * who + index] for index in range(length)])
            if steps - before < length:
                newest = before, who
        thinking = now + 0.5, steps, name
        for _ in range(pause):
            now += 1
            got = robot.step(now, held=blocked)
            ideal = None
            if newest is not None and not blocked and steps - newest[0] < length:
                ideal = [1000.0 * newest[1] + steps - newest[0]]
            assert got == ideal
            steps += got is not None


def test_grace_holds_the_last_row() -> None:
    robot = Robot(grace=1.0)
    robot.see(0, plan(0, 2))
    assert [robot.step(at) for at in (1, 2, 3, 4)] == [[0.0], [1.0], [1.0], None]


def test_a_timer_that_fires_early_holds_no_step_longer() -> None:
    robot = Robot()
    robot.see(0, plan(0, 2))
    assert [robot.step(at) for at in (1, 2, 2.98)] == [[0.0], [1.0], None]


def test_steps_of_a_clock_that_was_set_back_do_not_count() -> None:
    robot = Robot()
    for at in (100, 101, 102, 5):
        robot.executor.carried_out(at * PERIOD_NS)
    robot.see(4, plan(0, 5))
    assert robot.step(6) == [1.0], "one step was carried out since"


def test_a_loop_that_stood_still_does_not_go_on_with_an_old_plan() -> None:
    robot = Robot()
    robot.see(0, plan(0, 4))
    assert robot.step(1) == [0.0] and robot.step(24) == [1.0]
    assert robot.step(24.5) is None, "20 to think and 4 to be carried out is as old as it may be"


def test_latest_replaces_and_late_chunks_are_ignored() -> None:
    robot = Robot()
    robot.see(2, [[2.0], [2.0]])
    robot.see(1, [[1.0], [1.0], [1.0]])
    assert robot.step(3) == [2.0]
    robot.see(2, [[3.0], [3.0]])
    assert robot.step(4) == [3.0], "decided again from the same observation: the later word counts"


def test_a_plan_that_was_replaced_does_not_come_back() -> None:
    robot = Robot()
    robot.see(0, plan(0, 10))
    assert robot.step(1) == [0.0]
    robot.see(1, [[5.0], [5.0]])
    assert [robot.step(at) for at in (2, 3, 4)] == [[5.0], [5.0], None]


def test_rows_beyond_those_that_may_be_carried_out_are_never_used() -> None:
    chunk = Chunk.of(0, np.asarray(plan(0, 5)), 2, most=2)
    assert chunk.rows[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_temporal_ensembling_weighs_the_oldest_most() -> None:
    robot = Robot("ensemble", discrete=(1,))
    robot.see(0, [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert robot.step(1) == [0.0, 0.0]
    robot.see(1, [[10.0, 1.0], [20.0, 1.0]])
    weight = math.exp(-0.5)
    assert robot.step(2) == pytest.approx([(1.0 + 10.0 * weight) / (1 + weight), 1.0])
    assert robot.step(3) == pytest.approx([(2.0 + 20.0 * weight) / (1 + weight), 1.0])


def test_the_soft_mask_keeps_what_was_carried_out_and_blends_the_rest() -> None:
    """Eq. 5 of arXiv:2506.07339 by hand: H = 6 rows, s = 2 executed before the look, d = 1 during inference."""
    robot = Robot("soft_mask", discrete=(1,))
    robot.see(0, [[0.0, 0.0]] * 6)
    assert robot.step(1) == robot.step(2) == robot.step(3) == [0.0, 0.0]
    robot.see(2, [[1.0, 1.0]] * 6)

    def weight(step: int) -> float:
        progress = (4 - step) / (4 - 1 + 1)
        return progress * (math.exp(progress) - 1) / (math.e - 1)

    expected = [*(1 - weight(step) for step in (1, 2, 3)), 1.0, 1.0]
    found = [robot.step(4 + step) for step in range(5)]
    assert [row[0] for row in found if row] == pytest.approx(expected)
    assert all(row and row[1] == 1.0 for row in found), "a choice is never blended"


def test_clear_and_mistakes() -> None:
    robot = Robot()
    robot.see(0, [[1.0]])
    robot.executor.clear()
    assert robot.step(1) is None
    with pytest.raises(DataError, match="expected one of latest, ensemble, soft_mask"):
        Robot("average")
    with pytest.raises(DataError, match="expected actions of shape"):
        Chunk.of(0, np.zeros((0, 3)), 1)
