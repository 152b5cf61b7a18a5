"""Whether the robot may move at all: who allowed it, and what takes that back."""

from collections.abc import Collection

from vla_policy.core.safety import MEANT, HoldReason
from vla_policy.core.status import Latch


class Gate:
    """Open only while the server is active, its output enabled, motion started and no stop latched.

    disarm_after_s: a fault that lasts as long ends the permission to move; 0: never. disarm_at: faults that end it at
    once. outside: what is wrong beside the inputs, by what it concerns. Not thread-safe: its owner locks.
    """

    def __init__(self, disarm_after_s: float, disarm_at: Collection[HoldReason] = ()) -> None:
        self._disarm_after_ns, self._disarm_at = disarm_after_s * 1e9, frozenset(disarm_at)
        self.active = self.enabled = self.started = False
        self.latch: Latch | None = None
        self.outside: dict[str, HoldReason] = {}
        self._held_since_ns: int | None = None

    def reasons(self) -> list[HoldReason]:
        """Why it is closed."""
        found = []
        if not self.active:
            found.append(HoldReason.INACTIVE)
        if not self.enabled:
            found.append(HoldReason.DISABLED)
        if self.latch is not None:
            found.append(HoldReason.STOP_LATCHED)
        elif not self.started:
            found.append(HoldReason.NOT_STARTED)
        return found

    def obstacle(self) -> str | None:
        """Why `start` would be refused, beside the dry run; None if nothing stands in the way."""
        if self.latch is not None:
            return f"a stop is latched ({self.latch.reason}); reset it first"
        rivals = [what for what, reason in self.outside.items() if reason is HoldReason.OTHER_PUBLISHER]
        return f"another node commands the robot: {rivals[0]}; end it first" if rivals else None

    def enable(self, enabled: bool) -> None:
        """Allows motion and starts, unless something stands in the way; or back to the dry run."""
        self.enabled = enabled
        self.started = enabled and self.obstacle() is None

    def start(self) -> str | None:
        """Returns why not, or None."""
        refused = self.obstacle()
        if refused is None and not self.enabled:
            refused = "output is disabled (dry run); enable it first"
        self.started = self.started or refused is None
        return refused

    def stop(self, latch: Latch) -> None:
        """The first latch counts until it is taken back."""
        self.latch, self.started = self.latch or latch, False

    def close(self) -> None:
        """For good."""
        self.active = self.enabled = self.started = False

    def moved(self) -> None:
        self._held_since_ns = None

    def held(self, reasons: Collection[HoldReason], now_ns: int) -> None:
        """A control step without motion. Nobody expects the arm to go on by itself after a fault that lasted."""
        if not self._disarm_at.isdisjoint(reasons):
            self.started = False
        if not self.started or set(reasons) <= MEANT:
            self._held_since_ns = None
            return
        if self._held_since_ns is None or now_ns < self._held_since_ns:
            self._held_since_ns = now_ns
        if 0 < self._disarm_after_ns <= now_ns - self._held_since_ns:
            self.started = False
