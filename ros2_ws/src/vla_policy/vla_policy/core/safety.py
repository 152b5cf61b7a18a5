"""What stands between an action and the robot: limits that slow, and a gate that holds.

Limits keep the direction of motion: a velocity that is too large is scaled as a whole, a position beyond its range ends
at the range, and a change that is too fast is taken as far as its slew allows. At the workspace's border the velocity
that would leave it ends. `HoldReason` names why there is no motion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from vla_policy.core.contract import GRIPPER, ActionContract, WorkspaceAxis

_ROUNDING = 1e-9


class HoldReason(Enum):
    """Why the robot is held. The declared hold goes out instead of motion as long as any applies."""

    INACTIVE = "inactive"
    DISABLED = "disabled"
    NOT_STARTED = "not_started"
    STOP_LATCHED = "stop_latched"
    NO_INSTRUCTION = "no_instruction"
    REFUSED_INSTRUCTION = "refused_instruction"
    NO_CHUNK = "no_chunk"
    STALE_CAMERA = "stale_camera"
    STALE_STATE = "stale_state"
    FUTURE_STAMP = "future_stamp"
    FROZEN_CAMERA = "frozen_camera"
    DEADLINE_MISSED = "deadline_missed"
    OTHER_PUBLISHER = "other_publisher"
    NO_GRIPPER = "no_gripper"
    CLOCK_JUMP = "clock_jump"
    NO_CLOCK = "no_clock"


MEANT = frozenset({HoldReason.INACTIVE, HoldReason.DISABLED, HoldReason.NOT_STARTED, HoldReason.NO_INSTRUCTION})
"""Holds that somebody asked for; every other one says that something is wrong."""


@dataclass(frozen=True)
class Command:
    """What goes to the robot for one control step.

    `motion`: float64, SI units, of the dimensions in `targets` order. `gripper_m`: finger opening, None without one.
    `limited`: True where a limit slowed the motion.
    """

    targets: tuple[str, ...]
    motion: np.ndarray
    gripper_m: float | None
    limited: bool


class Limiter:
    """Policy actions to commands within the contract's limits.

    Slew bounds the change per time that has passed since the last command, at most one control period of it: neither a
    command that comes early nor a loop that stood still lets a faster change through.
    """

    def __init__(self, contract: ActionContract) -> None:
        self._contract = contract
        self._period_ns = contract.control_period_ns
        self._moving = [index for index, item in enumerate(contract.dimensions) if item.target != GRIPPER]
        self._gripper = next((index for index, item in enumerate(contract.dimensions) if item.target == GRIPPER), None)
        dimensions = [contract.dimensions[index] for index in self._moving]
        self.targets = tuple(item.target for item in dimensions)
        self._lower = np.asarray([item.lower for item in dimensions])
        self._upper = np.asarray([item.upper for item in dimensions])
        self._slew = np.asarray([np.inf if item.slew is None else item.slew for item in dimensions])
        # Translation, rotation and joints each keep their own direction.
        parts = [target.split(".")[0] if contract.command == "twist" else "joints" for target in self.targets]
        self._groups = [np.flatnonzero([part == name for part in parts]) for name in dict.fromkeys(parts)]
        self._last: np.ndarray | None = None
        self._last_ns: int | None = None
        self._above: bool | None = None
        self.rest()

    @property
    def discrete(self) -> tuple[int, ...]:
        """Columns of the action that are choices and must not be blended."""
        return () if self._gripper is None else (self._gripper,)

    def rest(self, positions: np.ndarray | None = None) -> None:
        """After a hold, slew limits start from standstill, or from the measured `positions` under position control."""
        self._last = np.zeros(len(self._moving)) if self._contract.command == "twist" else positions
        self._last_ns = None

    def command(self, action: np.ndarray, now_ns: int, room: "Room | None" = None) -> Command | None:
        """The command for `action` [K] at `now_ns`; `room` bounds velocities by the workspace.

        None when a value is not finite, or when the joints' positions are not known to start from.
        """
        dimensions = self._contract.dimensions
        values = np.asarray([value * item.scale + item.offset for value, item in zip(action, dimensions, strict=True)])
        if self._last is None or not np.isfinite(values).all():
            return None
        wanted = values[self._moving]
        motion = self._within(wanted)
        motion = self._slewed(motion, now_ns)
        if room is not None:
            # After the slew: standing still at the border goes before a gentle change.
            motion = np.clip(motion, room.lower, room.upper)
        self._last, self._last_ns = motion, now_ns
        limited = bool((np.abs(motion - wanted) > _ROUNDING).any())
        return Command(self.targets, motion, self._opening(values), limited)

    def halt(self, positions: np.ndarray | None, now_ns: int) -> Command | None:
        """The command that ends a motion: zero velocity at once, or towards the measured `positions`, within the slew.

        None under position control while no position was measured, or when nothing was commanded from which to go on.
        """
        if self._contract.command == "twist":
            return Command(self.targets, np.zeros(len(self._moving)), None, False)
        if positions is None or self._last is None:
            return None
        motion = self._slewed(positions, now_ns)
        self._last, self._last_ns = motion, now_ns
        return Command(self.targets, motion, None, False)

    def _within(self, wanted: np.ndarray) -> np.ndarray:
        """`wanted` within the limits: velocities scaled as a whole, each position ending at its range."""
        if self._contract.command != "twist":
            return np.clip(wanted, self._lower, self._upper)
        motion = wanted.copy()
        for group in self._groups:
            motion[group] *= _fraction(np.abs(motion[group]), self._upper[group])
        return motion

    def _slewed(self, wanted: np.ndarray, now_ns: int) -> np.ndarray:
        """As far from the last command towards `wanted` as the time since then allows."""
        assert self._last is not None
        elapsed_ns = self._period_ns if self._last_ns is None else now_ns - self._last_ns
        allowed = self._slew * min(max(elapsed_ns, 0), self._period_ns) / 1e9
        motion = wanted.copy()
        for group in self._groups:
            change = wanted[group] - self._last[group]
            fraction = _fraction(np.abs(change), allowed[group])
            if fraction < 1:  # else as wanted to the last bit, which a difference added again is not
                motion[group] = self._last[group] + change * fraction
        return motion

    def _opening(self, values: np.ndarray) -> float | None:
        gripper = self._contract.gripper
        if gripper is None or self._gripper is None:
            return None
        self._above = gripper.above(float(values[self._gripper]), self._above)
        return gripper.above_m if self._above else gripper.below_m


def _fraction(size: np.ndarray, allowed: np.ndarray) -> float:
    """The largest factor up to 1 that brings every `size` within `allowed`."""
    over = size > allowed
    return float(np.min(allowed[over] / size[over])) if over.any() else 1.0


@dataclass(frozen=True)
class Room:
    """The velocities that keep the arm in its workspace for a while: bounds of each moving dimension, SI units.

    lower, upper: float64, in the limiter's `targets` order; infinite for dimensions that the workspace does not bound.
    """

    lower: np.ndarray
    upper: np.ndarray

    @staticmethod
    def of(
        targets: Sequence[str], workspace: Sequence[WorkspaceAxis], measured: Mapping[str, float], reach_s: float
    ) -> "Room":
        """What brings no axis past its border within `reach_s`. An axis that is outside may only come back."""
        lower, upper = np.full(len(targets), -np.inf), np.full(len(targets), np.inf)
        for axis in workspace:
            column, place = targets.index(axis.target), measured[axis.state]
            lower[column] = min(0.0, (axis.lower - place) / reach_s)
            upper[column] = max(0.0, (axis.upper - place) / reach_s)
        return Room(lower, upper)


class Halts:
    """How many holds a motion still needs to end; `most` 0: as many as the hold lasts."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._left = 0
        self.target: np.ndarray | None = None
        """Where the first hold of this motion found the joints, which the later ones repeat."""

    @property
    def due(self) -> bool:
        return self._left > 0

    def moved(self) -> None:
        self._left, self.target = self._most or 1, None

    def sent(self, target: np.ndarray | None) -> None:
        self.target = target
        if self._most:
            self._left -= 1

    def forget(self) -> None:
        """There is nothing to end: what was commanded before is no longer what the robot does."""
        self._left, self.target = 0, None


class FreezeDetector:
    """A camera that repeats one image under new stamps is frozen, whatever its stamps say."""

    def __init__(self, timeout_ns: int) -> None:
        self._timeout_ns = timeout_ns
        self._checksum: int | None = None
        self._since_ns = 0
        self._frozen = False

    def see(self, checksum: int, stamp_ns: int) -> None:
        if checksum != self._checksum or stamp_ns < self._since_ns:
            self._checksum, self._since_ns = checksum, stamp_ns
        self._frozen = 0 < self._timeout_ns <= stamp_ns - self._since_ns

    @property
    def frozen(self) -> bool:
        return self._frozen
