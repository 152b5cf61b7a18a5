"""The output watchdog: sends the hold when the control loop itself stands still."""

import threading
import time
from collections.abc import Callable


class OutputWatchdog:
    """Calls `hold` when `feed` was not called for `timeout_s` of the steady clock; again after each further timeout.

    Runs in its own thread, so a blocked executor, a stalled simulated clock or an endless callback cannot silence it.
    """

    def __init__(self, timeout_s: float, hold: Callable[[], None]) -> None:
        self._timeout_s, self._hold = timeout_s, hold
        self._fed_s = time.monotonic()
        self._ending = threading.Event()
        self.holds = 0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def feed(self) -> None:
        self._fed_s = time.monotonic()

    def close(self) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(max(0.0, self._fed_s + self._timeout_s - time.monotonic()) or self._timeout_s):
            if time.monotonic() - self._fed_s >= self._timeout_s:
                self.holds += 1
                self._hold()
