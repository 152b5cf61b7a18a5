"""Limits that slow and keep the direction; frozen cameras."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_policy.core.contract import ActionDimension, WorkspaceAxis, load_contract
from vla_policy.core.safety import FreezeDetector, Limiter, Room

LIBERO = load_contract(Path(__file__).parents[2] / "ros2_ws/src/vla_policy/config/libero.yaml").action
# With limits at actions of 1, which is easier to reckon with.
CONTRACT = replace(
    LIBERO, dimensions=tuple(replace(item, lower=-item.scale, upper=item.scale) for item in LIBERO.dimensions)
)
PERIOD_NS = 50_000_000
# Half a unit of change per control period, so that the slew limit is what shows.
SLOW = replace(CONTRACT, dimensions=tuple(replace(item, slew=item.upper * 10) for item in CONTRACT.dimensions))
VALUES = st.lists(st.floats(-1e6, 1e6), min_size=7, max_size=7)


def test_a_command_within_the_limits_passes_unchanged() -> None:
    command = Limiter(CONTRACT).command(np.asarray([0.5, -0.5, 0.1, 0.2, 0.0, -1.0, -1.0]), 0)
    assert command is not None and not command.limited and command.gripper_m == 0.08
    np.testing.assert_allclose(command.motion, [0.5, -0.5, 0.1, 2.0, 0.0, -10.0])


def test_what_no_limit_meets_goes_on_to_the_last_bit() -> None:
    """A difference that is taken and added again is not: contacts make another episode of one bit."""
    limiter = Limiter(LIBERO)
    for step, row in enumerate(np.random.default_rng(0).uniform(-1.25, 1.25, (200, 7))):
        command = limiter.command(row, step * PERIOD_NS)
        assert command is not None and not command.limited
        np.testing.assert_array_equal(command.motion, row[:6] * [1, 1, 1, 10, 10, 10])


def test_the_gripper_s_choice_has_hysteresis() -> None:
    """By hand: up to 0.3 an open gripper stays open, down to -0.3 a closed one closed; a hold forgets no choice."""
    assert CONTRACT.gripper is not None
    limiter = Limiter(replace(CONTRACT, gripper=replace(CONTRACT.gripper, hysteresis=0.3)))
    found = []
    for step, value in enumerate([-0.1, 0.2, 0.3, 0.31, 0.0, -0.3, -0.31, 0.2]):
        command = limiter.command(np.asarray([0, 0, 0, 0, 0, 0, value]), step * 50_000_000)
        found.append(None if command is None else command.gripper_m)
        limiter.rest()
    assert found == [0.08, 0.08, 0.08, 0.0, 0.0, 0.08, 0.08, 0.08]
    unknown = Limiter(replace(CONTRACT, gripper=replace(CONTRACT.gripper, hysteresis=0.3)))
    first = unknown.command(np.asarray([0, 0, 0, 0, 0, 0, 0.1]), 0)
    assert first is not None and first.gripper_m == 0.0, "nothing was chosen yet: the threshold alone decides"


def test_the_gripper_closes_above_the_contract_s_threshold() -> None:
    assert CONTRACT.gripper is not None
    limiter = Limiter(replace(CONTRACT, gripper=replace(CONTRACT.gripper, threshold=0.5)))
    commands = [limiter.command(np.asarray([0, 0, 0, 0, 0, 0, value]), 0) for value in (0.4, 0.5, 0.6)]
    assert [command.gripper_m for command in commands if command] == [0.08, 0.08, 0.0]


def test_after_a_hold_a_velocity_starts_from_standstill() -> None:
    limiter = Limiter(SLOW)
    ahead = np.asarray([1.0, 0, 0, 0, 0, 0, 0])
    reached = []
    for step in range(4):
        if step == 2:
            limiter.rest()
        command = limiter.command(ahead, step * PERIOD_NS)
        assert command is not None
        reached.append(command.motion[0])
    assert reached == pytest.approx([0.5, 1.0, 0.5, 1.0])


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


@given(st.lists(st.tuples(st.floats(-1.0, 1.0), st.integers(0, 3 * PERIOD_NS)), min_size=1, max_size=20))
def test_slew_is_a_bound_per_elapsed_time(steps: list[tuple[float, int]]) -> None:
    """However commands are spaced, the change over any span is within slew times that span, plus the first step."""
    limiter, now_ns = Limiter(SLOW), 0
    seen: list[tuple[int, float]] = []
    for wanted, gap_ns in steps:
        now_ns += gap_ns
        command = limiter.command(np.asarray([wanted, 0, 0, 0, 0, 0, 0]), now_ns)
        assert command is not None
        seen.append((now_ns, float(command.motion[0])))
    slew = 10.0  # per second
    assert abs(seen[0][1]) <= slew * PERIOD_NS / 1e9 + 1e-9
    for index, (then_ns, before) in enumerate(seen):
        for later_ns, after in seen[index + 1 :]:
            assert abs(after - before) <= slew * (later_ns - then_ns) / 1e9 + 1e-9
    gaps = [later[0] - then[0] for then, later in pairwise(seen)]
    changes = [abs(later[1] - then[1]) for then, later in pairwise(seen)]
    assert all(change <= slew * min(gap, PERIOD_NS) / 1e9 + 1e-9 for change, gap in zip(changes, gaps, strict=True))


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308])  # the last one overflows in the command's unit
def test_what_is_not_finite_gives_no_command(value: float) -> None:
    assert Limiter(CONTRACT).command(np.asarray([0, 0, 0, 0, 0, value, 0]), 0) is None


def joint_limiter() -> Limiter:
    """Two joints within -2 to 2.5 rad at 1 rad/s."""
    joints = tuple(ActionDimension(f"q{k}", f"joint{k}", "rad", 1.0, 0.0, -2.0, 2.5, 1.0) for k in range(2))
    return Limiter(replace(CONTRACT, command="joint_trajectory", dimensions=joints, gripper=None))


def test_joint_positions_start_from_the_measured_ones() -> None:
    limiter = joint_limiter()
    assert limiter.command(np.asarray([1.0, 1.0]), 0) is None, "nothing to start from yet"
    limiter.rest(np.asarray([0.5, 3.0]))
    command = limiter.command(np.asarray([1.0, 5.0]), 0)
    assert command is not None and command.limited
    np.testing.assert_allclose(command.motion, [0.55, 2.95]), "as far as the slew allows, towards the range's end"


def test_positions_end_at_either_side_of_their_range() -> None:
    limiter, last = joint_limiter(), np.zeros(2)
    limiter.rest(last)
    for step in range(200):
        command = limiter.command(np.asarray([-9.0, 9.0]), step * PERIOD_NS)
        assert command is not None
        assert (np.abs(command.motion - last) <= 0.05 + 1e-9).all()
        last = command.motion
    np.testing.assert_allclose(last, [-2.0, 2.5])


def test_a_halt_goes_to_the_measured_positions_within_the_slew() -> None:
    limiter = joint_limiter()
    limiter.rest(np.zeros(2))
    assert limiter.command(np.asarray([1.0, 0.0]), 0) is not None  # commanded 0.05, the arm lags at 0
    for step, expected in enumerate([0.0, 0.0]):
        halt = limiter.halt(np.zeros(2), (step + 1) * PERIOD_NS)
        assert halt is not None and halt.gripper_m is None
        np.testing.assert_allclose(halt.motion, [expected, 0.0])
    far = limiter.halt(np.asarray([1.0, 0.0]), 3 * PERIOD_NS)
    assert far is not None
    np.testing.assert_allclose(far.motion, [0.05, 0.0]), "a hold is no jump either"
    assert joint_limiter().halt(None, 0) is None, "no position is known that could be held"


def test_a_twist_halts_at_once() -> None:
    limiter = Limiter(SLOW)
    assert limiter.command(np.ones(7), 0) is not None
    halt = limiter.halt(None, 1)
    assert halt is not None and not halt.motion.any()


BOX = (WorkspaceAxis("linear.x", "x", -0.2, 0.3), WorkspaceAxis("linear.z", "z", 0.1, 0.9))


@given(st.floats(-0.5, 0.5), st.floats(0.0, 1.0), st.lists(st.floats(-1.0, 1.0), min_size=3, max_size=3))
def test_no_velocity_leaves_the_workspace(x: float, z: float, wanted: list[float]) -> None:
    limiter, reach_s = Limiter(CONTRACT), 0.1
    room = Room.of(limiter.targets, BOX, {"x": x, "z": z}, reach_s)
    command = limiter.command(np.asarray([*wanted, 0, 0, 0, 0]), 0, room)
    assert command is not None
    for column, place, lower, upper in ((0, x, -0.2, 0.3), (2, z, 0.1, 0.9)):
        velocity = command.motion[column]
        after = place + velocity * reach_s
        assert lower - 1e-9 <= after <= upper + 1e-9 or abs(after - np.clip(after, lower, upper)) <= abs(
            place - np.clip(place, lower, upper)
        ), "outside already: no farther"
        assert abs(velocity) <= abs(wanted[column]) + 1e-9 or np.sign(velocity) == np.sign(wanted[column])
    assert command.motion[1] == pytest.approx(wanted[1]), "an axis without a border"


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
    detector.see(2, 700)  # the clock was set back: the time of the old one says nothing
    assert not detector.frozen
    detector.see(2, 1700)
    assert detector.frozen
    off = FreezeDetector(0)
    off.see(1, 0)
    off.see(1, 10**12)
    assert not off.frozen
