"""Chunk execution against the definitions of temporal ensembling and real-time chunking."""

import math

import numpy as np
import pytest

from vla_policy.core.chunks import Chunk, ChunkExecutor
from vla_policy.core.errors import DataError

PERIOD_NS = 50_000_000


def executor(blending: str = "latest", grace_ns: int = 0, discrete: tuple[int, ...] = ()) -> ChunkExecutor:
    return ChunkExecutor(PERIOD_NS, grace_ns, discrete, blending, decay=0.5)


def chunk(observed: float, decided: float, rows: list[list[float]]) -> Chunk:
    """Times in control periods."""
    return Chunk.of(round(observed * PERIOD_NS), round(decided * PERIOD_NS), np.asarray(rows), 1)


def at(runner: ChunkExecutor, periods: float) -> list[float] | None:
    action = runner.action(round(periods * PERIOD_NS))
    return None if action is None else action.tolist()


def test_a_held_action_starts_when_it_was_decided_and_lasts_its_steps() -> None:
    runner = executor()
    runner.submit(Chunk.of(0, 2 * PERIOD_NS, np.asarray([7.0]), 4))
    assert [at(runner, k) for k in (1.9, 2, 5.9, 6)] == [None, [7.0], [7.0], None]


def test_a_chunk_of_rows_is_aligned_to_its_observation() -> None:
    runner = executor()
    runner.submit(chunk(0, 1.5, [[0.0], [1.0], [2.0]]))
    assert [at(runner, k) for k in (1.5, 2, 2.99, 3)] == [[1.0], [2.0], [2.0], None]


def test_grace_holds_the_last_row() -> None:
    runner = executor(grace_ns=PERIOD_NS)
    runner.submit(chunk(0, 0, [[0.0], [1.0]]))
    assert [at(runner, k) for k in (2.5, 3)] == [[1.0], None]


def test_latest_replaces_and_late_chunks_are_ignored() -> None:
    runner = executor()
    runner.submit(chunk(2, 2, [[2.0], [2.0]]))
    runner.submit(chunk(1, 2, [[1.0], [1.0], [1.0]]))
    assert at(runner, 2) == [2.0]


def test_temporal_ensembling_weighs_the_oldest_most() -> None:
    runner = executor("ensemble", discrete=(1,))
    runner.submit(chunk(0, 0, [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]))
    runner.submit(chunk(1, 1, [[10.0, 1.0], [20.0, 1.0]]))
    weight = math.exp(-0.5)
    assert at(runner, 2) == pytest.approx([(2.0 + 20.0 * weight) / (1 + weight), 1.0])


def test_the_soft_mask_keeps_what_was_due_and_blends_the_rest() -> None:
    """Eq. 5 of arXiv:2506.07339 by hand: H = 6 rows, s = 2 executed, d = 1 frozen."""
    runner = executor("soft_mask", discrete=(1,))
    runner.submit(chunk(0, 0, [[0.0, 0.0]] * 6))
    runner.submit(chunk(2, 3, [[1.0, 1.0]] * 6))

    def weight(step: int) -> float:
        progress = (4 - step) / (4 - 1 + 1)
        return progress * (math.exp(progress) - 1) / (math.e - 1)

    expected = [0.0, *(1 - weight(step) for step in (1, 2, 3)), 1.0, 1.0]
    found = [at(runner, 2 + step) for step in range(6)]
    assert [row[0] for row in found if row] == pytest.approx(expected)
    assert all(row and row[1] == 1.0 for row in found), "a choice is never blended"


def test_clear_and_mistakes() -> None:
    runner = executor()
    runner.submit(chunk(0, 0, [[1.0]]))
    runner.clear()
    assert at(runner, 0) is None
    with pytest.raises(DataError, match="expected one of latest, ensemble, soft_mask"):
        executor("average")
    with pytest.raises(DataError, match="expected actions of shape"):
        Chunk.of(0, 0, np.zeros((0, 3)), 1)
