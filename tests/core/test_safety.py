"""Limits that slow and keep the direction; frozen cameras."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_policy.core.contract import ActionDimension, load_contract
from vla_policy.core.safety import FreezeDetector, Limiter

CONTRACT = load_contract(Path(__file__).parents[2] / "ros2_ws/src/vla_policy/config/libero.yaml").action
PERIOD_NS = 50_000_000
# Half a unit of change per control period, so that the slew limit is what shows.
SLOW = replace(CONTRACT, dimensions=tuple(replace(item, slew=item.limit * 10) for item in CONTRACT.dimensions))
VALUES = st.lists(st.floats(-1e6, 1e6), min_size=7, max_size=7)


def test_a_command_within_the_limits_passes_unchanged() -> None:
    command = Limiter(CONTRACT).command(np.asarray([0.5, -0.5, 0.1, 0.2, 0.0, -1.0, -1.0]), 0)
    assert command is not None and not command.limited and command.gripper_m == 0.08
    np.testing.assert_allclose(command.motion, [0.5, -0.5, 0.1, 2.0, 0.0, -10.0])


@given(VALUES)
def test_limits_hold_and_the_direction_stays(values: list[float]) -> None:
    command = Limiter(CONTRACT).command(np.asarray(values), 0)
    assert command is not None
    limits = np.asarray([1.0] * 3 + [10.0] * 3)
    assert (np.abs(command.motion) <= limits * (1 + 1e-9)).all()
    for part in (slice(0, 3), slice(3, 6)):
        wanted = np.asarray(values[part]) * (1 if part.start == 0 else 10)
        cross = np.cross(command.motion[part], wanted)
        scale = max(1e-12, float(np.linalg.norm(command.motion[part]) * np.linalg.norm(wanted)))
        assert np.linalg.norm(cross) / scale < 1e-6


@given(VALUES, VALUES)
def test_slew_bounds_every_change(first: list[float], second: list[float]) -> None:
    limiter = Limiter(SLOW)
    before, after = limiter.command(np.asarray(first), 0), limiter.command(np.asarray(second), PERIOD_NS)
    assert before is not None and after is not None
    assert (np.abs(after.motion - before.motion) <= np.asarray([0.5] * 3 + [5.0] * 3) * (1 + 1e-9)).all()


def test_a_decision_right_after_a_step_replaces_it() -> None:
    limiter = Limiter(SLOW)
    for now_ns, wanted, expected in [
        (0, 1.0, 0.5),
        (1_000, -1.0, -0.5),
        (PERIOD_NS, 1.0, 0.0),
        (2 * PERIOD_NS, 1.0, 0.5),
    ]:
        command = limiter.command(np.asarray([wanted, 0, 0, 0, 0, 0, 0]), now_ns)
        assert command is not None and command.motion[0] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308])  # the last one overflows in the command's unit
def test_what_is_not_finite_gives_no_command(value: float) -> None:
    assert Limiter(CONTRACT).command(np.asarray([0, 0, 0, 0, 0, value, 0]), 0) is None


def test_joint_positions_start_from_the_measured_ones() -> None:
    joints = tuple(ActionDimension(f"q{k}", f"joint{k}", "rad", 1.0, 0.0, 2.0, 1.0) for k in range(2))
    limiter = Limiter(replace(CONTRACT, command="joint_trajectory", dimensions=joints, gripper=None))
    assert limiter.command(np.asarray([1.0, 1.0]), 0) is None, "nothing to start from yet"
    limiter.rest(np.asarray([0.5, 3.0]))
    command = limiter.command(np.asarray([1.0, 5.0]), 0)
    assert command is not None and command.limited
    np.testing.assert_allclose(command.motion, [0.525, 2.95]), "as far as the slew allows, towards the range's end"


def test_a_frozen_camera_is_seen_after_the_timeout() -> None:
    detector = FreezeDetector(1000)
    for stamp, checksum, frozen in [
        (0, 1, False),
        (999, 1, False),
        (1000, 1, True),
        (1001, 2, False),
        (1500, 2, False),
    ]:
        detector.see(checksum, stamp)
        assert detector.frozen is frozen
    off = FreezeDetector(0)
    off.see(1, 0)
    off.see(1, 10**12)
    assert not off.frozen
