"""Which states are chosen, and that a calibration set comes back as it was written."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fake_source import FakeSource
from hypothesis import given
from hypothesis import strategies as st

from calibrator.data.calibration import choose_states, collect, load_calibration
from calibrator.data.records import Trajectory
from vla_policy.core.errors import ArtefactError, DataError


def trajectories(*lengths: int) -> list[Trajectory]:
    return [Trajectory(f"episode_{index}", length, tuple(range(length))) for index, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 5), st.data())
def test_choice_is_distinct_even_and_reproducible(lengths: list[int], seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, sum(lengths)))
    chosen = choose_states(trajectories(*lengths), count, seed)
    assert len(set(chosen)) == len(chosen) == count
    assert all(0 <= step < lengths[index] for index, step in chosen)
    assert chosen == choose_states(trajectories(*lengths), count, seed)
    shares = Counter(index for index, _ in chosen)
    # No trajectory gives two more than another, unless the other has no more to give.
    for index, length in enumerate(lengths):
        assert shares[index] >= min(length, max(shares.values()) - 1)


def test_progress_is_covered_even_with_one_state_per_trajectory() -> None:
    chosen = choose_states(trajectories(*[101] * 20), 20, seed=3)
    progress = sorted(step / 100 for _, step in chosen)
    assert np.abs(np.asarray(progress) - (np.arange(20) + 0.5) / 20).max() <= 0.03


def test_unusable_steps_are_not_chosen() -> None:
    odd = Trajectory("episode_0", 20, tuple(range(1, 20, 2)))
    assert all(step % 2 for _, step in choose_states([odd], 10, seed=0))


def test_asking_for_more_than_there_is_names_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="9 states were asked for, the sources hold 7"):
        collect([FakeSource((3, 4))], tmp_path / "set", count=9, seed=0)
    with pytest.raises(DataError, match="at least 1"):
        collect([FakeSource((3, 4))], tmp_path / "set", count=0, seed=0)
    assert not list(tmp_path.iterdir())


def test_a_set_comes_back_as_it_was_written(tmp_path: Path) -> None:
    collect([FakeSource((6, 5)), FakeSource((7,), seed=1)], tmp_path / "set", count=9, seed=0)
    loaded = load_calibration(tmp_path / "set")
    assert len(loaded) == 9 and loaded.trajectories == 3
    for index, sample in enumerate(loaded.samples):
        source = FakeSource((6, 5)) if sample.source == 0 else FakeSource((7,), seed=1)
        (expected,) = (one.observation for one in source.read({sample.trajectory: frozenset({sample.step})}))
        got = loaded.observation(index)
        np.testing.assert_array_equal(got.image, expected.image)
        assert got.instruction == expected.instruction
        assert got.state is not None and expected.state is not None
        np.testing.assert_allclose(got.state, expected.state, rtol=1e-6)  # kept as float32
        assert sample.progress == sample.step / (sample.length - 1)


def test_without_states_there_are_none(tmp_path: Path) -> None:
    collect([FakeSource((4,), state_dim=None)], tmp_path / "set", count=2, seed=0)
    assert load_calibration(tmp_path / "set").states == (None, None)


def test_sources_with_different_states_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="different lengths"):
        collect([FakeSource((4,)), FakeSource((4,), state_dim=3)], tmp_path / "set", count=8, seed=0)


def test_a_changed_or_missing_set_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    collect([FakeSource((4,))], folder, count=2, seed=0)
    tensors = folder / "samples.safetensors"
    data = bytearray(tensors.read_bytes())
    tensors.write_bytes(bytes(data[:-5]))
    with pytest.raises(ArtefactError, match="not the file that"):
        load_calibration(folder)
    index = json.loads((folder / "calibration.json").read_text())
    (folder / "calibration.json").write_text(json.dumps(index | {"kind": "plan"}))
    with pytest.raises(ArtefactError, match="expected kind 'calibration'"):
        load_calibration(folder)
    with pytest.raises(ArtefactError, match="cannot be read"):
        load_calibration(tmp_path / "nowhere")
