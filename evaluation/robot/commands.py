"""What whoever drives the simulated robot has said, and simulated time that waits for it. No ROS here."""

import threading
from collections.abc import Callable

from vla_policy.core.errors import ContractError


class Commands:
    """The last words of the driver, from the threads that hear them to the one that simulates.

    Limits in seconds of the wall clock. decision_s: for the decision on an image. command_s: for the command of an
    instant; a busy machine is late, and what moved the step before must not move this one. silence_s: for a command
    behind an instant that had none; a policy that holds is silent.
    """

    def __init__(self, decision_s: float = 10.0, command_s: float = 5.0, silence_s: float = 0.05) -> None:
        self._decision_s, self._command_s, self._silence_s = decision_s, command_s, silence_s
        self._changed = threading.Condition()
        self._closed = self._silent = False
        self._decided_ns = self._commanded_ns = self._gripped = self._missed = 0
        self._twist: tuple[int, dict[str, float]] | None = None
        self._opening_m: float | None = None

    # --- heard --------------------------------------------------------------------------------------------------

    def decided(self, stamp_ns: int) -> None:
        """A decision on the image of that stamp."""
        with self._changed:
            self._decided_ns = stamp_ns
            self._changed.notify_all()

    def move(self, twist: dict[str, float], now_ns: int, stamp_ns: int) -> None:
        """A motion, SI values by the contract's targets. now_ns: when it was heard; stamp_ns: the instant it is for."""
        with self._changed:
            self._twist, self._commanded_ns = (now_ns, twist), stamp_ns
            self._changed.notify_all()

    def grip(self, opening_m: float | None) -> None:
        """An opening of the gripper; None moves it not."""
        with self._changed:
            self._opening_m, self._gripped = opening_m, self._gripped + 1
            self._changed.notify_all()

    # --- simulated ----------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Before an episode: what was said in the last one moves nothing."""
        with self._changed:
            self._twist = self._opening_m = None
            self._missed, self._silent = 0, False

    def await_decision(self, stamp_ns: int) -> None:
        """Until the image of that stamp is decided upon. Raises ContractError when it is not."""
        if not self._await(lambda: self._decided_ns >= stamp_ns, self._decision_s):
            raise ContractError(
                f"simulated robot: no decision on the image of {stamp_ns} ns within {self._decision_s:g} s; is the "
                "policy node active, and does it use_sim_time?"
            )

    def await_command(self, instant_ns: int, gripped: int | None) -> None:
        """Until the command of an instant is there, or is given up and counted.

        gripped: `self.gripped` before the clock reached the instant; None for a robot without a gripper.
        """
        limit_s = self._silence_s if self._silent else self._command_s
        self._silent = not self._await(
            lambda: self._commanded_ns >= instant_ns and (gripped is None or self._gripped > gripped), limit_s
        )
        self._missed += self._silent

    def twist(self, now_ns: int, timeout_ns: int) -> dict[str, float]:
        """The motion that holds now; none when the last one was heard longer ago than the timeout."""
        with self._changed:
            fresh = self._twist is not None and now_ns - self._twist[0] <= timeout_ns
            return self._twist[1] if fresh and self._twist is not None else {}

    @property
    def opening_m(self) -> float | None:
        return self._opening_m

    @property
    def gripped(self) -> int:
        """Openings that were heard."""
        return self._gripped

    @property
    def missed(self) -> int:
        """Instants of this episode without a command."""
        return self._missed

    def close(self) -> None:
        """Nothing is waited for any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _await(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Whether the condition holds within the limit; of what is closed it does."""
        with self._changed:
            return self._changed.wait_for(lambda: condition() or self._closed, limit_s)
