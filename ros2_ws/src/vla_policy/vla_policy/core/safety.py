"""What stands between an action and the robot: limits that slow, and a gate that holds.

Limits keep the direction of motion: a velocity that is too large is scaled as a whole, a position beyond its range ends
at the range, and a change that is too fast is taken as far as its slew allows. `HoldReason` names why there is none.
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np

from vla_policy.core.contract import GRIPPER, ActionContract

_ROUNDING = 1e-9


class HoldReason(Enum):
    """Why the robot is held. The declared hold goes out instead of motion as long as any applies."""

    INACTIVE = "inactive"
    DISABLED = "disabled"
    NOT_STARTED = "not_started"
    STOP_LATCHED = "stop_latched"
    NO_INSTRUCTION = "no_instruction"
    NO_CHUNK = "no_chunk"
    STALE_CAMERA = "stale_camera"
    STALE_STATE = "stale_state"
    FUTURE_STAMP = "future_stamp"
    FROZEN_CAMERA = "frozen_camera"
    DEADLINE_MISSED = "deadline_missed"
    CLOCK_JUMP = "clock_jump"


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

    Slew is bounded per control period, from the command with which the period began: a decision that arrives right
    after a control step replaces that step's command and is not held back by it.
    """

    def __init__(self, contract: ActionContract) -> None:
        self._contract = contract
        self._period_ns = contract.control_period_ns
        self._moving = [index for index, item in enumerate(contract.dimensions) if item.target != GRIPPER]
        self._gripper = next((index for index, item in enumerate(contract.dimensions) if item.target == GRIPPER), None)
        dimensions = [contract.dimensions[index] for index in self._moving]
        self.targets = tuple(item.target for item in dimensions)
        self._limit = np.asarray([item.limit for item in dimensions])
        slew = np.asarray([np.inf if item.slew is None else item.slew for item in dimensions])
        self._change = slew * self._period_ns / 1e9
        # Translation, rotation and joints each keep their own direction.
        parts = [target.split(".")[0] if contract.command == "twist" else "joints" for target in self.targets]
        self._groups = [np.flatnonzero([part == name for part in parts]) for name in dict.fromkeys(parts)]
        self._last: np.ndarray | None = None
        self._base: np.ndarray | None = None
        self._period_began_ns: int | None = None
        self.rest()

    @property
    def discrete(self) -> tuple[int, ...]:
        """Columns of the action that are choices and must not be blended."""
        return () if self._gripper is None else (self._gripper,)

    def rest(self, positions: np.ndarray | None = None) -> None:
        """After a hold, slew limits start from standstill, or from the measured `positions` under position control."""
        self._last = np.zeros(len(self._moving)) if self._contract.command == "twist" else positions
        self._period_began_ns = None

    def command(self, action: np.ndarray, now_ns: int) -> Command | None:
        """The command for `action` [K] at `now_ns`.

        None when a value is not finite, or when the joints' positions are not known to start from.
        """
        dimensions = self._contract.dimensions
        values = np.asarray([value * item.scale + item.offset for value, item in zip(action, dimensions, strict=True)])
        if self._last is None or not np.isfinite(values).all():
            return None
        # Half a period of tolerance, for a timer that fires a little early.
        if self._period_began_ns is None or not 0 <= now_ns - self._period_began_ns < self._period_ns // 2:
            self._base, self._period_began_ns = self._last, now_ns
        base = self._last if self._base is None else self._base
        wanted = values[self._moving]
        motion = wanted.copy()
        for group in self._groups:
            if self._contract.command == "twist":
                motion[group] *= _fraction(np.abs(motion[group]), self._limit[group])
            else:
                motion[group] = np.clip(motion[group], -self._limit[group], self._limit[group])
            change = motion[group] - base[group]
            motion[group] = base[group] + change * _fraction(np.abs(change), self._change[group])
        self._last = motion
        limited = bool((np.abs(motion - wanted) > _ROUNDING).any())
        return Command(self.targets, motion, self._opening(values), limited)

    def _opening(self, values: np.ndarray) -> float | None:
        gripper = self._contract.gripper
        if gripper is None or self._gripper is None:
            return None
        return gripper.above_m if values[self._gripper] > gripper.threshold else gripper.below_m


def _fraction(size: np.ndarray, allowed: np.ndarray) -> float:
    """The largest factor up to 1 that brings every `size` within `allowed`."""
    over = size > allowed
    return float(np.min(allowed[over] / size[over])) if over.any() else 1.0


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
