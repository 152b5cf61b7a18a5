"""Back-pressure of a replay: which frames are out, and for how long an answer to them is waited for."""

import threading
import time
from collections import deque

_POLL_S = 0.2


class Unanswered:
    """The frames whose answer is still to come; the publishing thread waits here, the executor brings answers.

    A policy answers in the order in which frames came: an answer says that those before it will have none.
    """

    def __init__(self, timeout_s: float, closing: threading.Event) -> None:
        self._timeout_s, self._closing = timeout_s, closing
        self._changed = threading.Condition()
        self._stamps: deque[int] = deque()  # waited for, in order
        self._without: set[int] = set()  # of all frames that have no answer so far
        self._unheard: deque[int] = deque()  # sent after the last one that was answered
        self._silent = False
        self._last_answer_s = time.monotonic()
        self.sent = self.answered = 0

    def send(self, stamp_ns: int) -> None:
        """An image goes out."""
        with self._changed:
            self.sent += 1
            self._without.add(stamp_ns)
            self._unheard.append(stamp_ns)

    @property
    def heard(self) -> bool:
        """Whether answers prove that every image that went out has been heard."""
        return not self._unheard

    def expect(self, stamp_ns: int) -> None:
        """All that the policy needs for this frame has gone out."""
        with self._changed:
            if stamp_ns in self._without:
                self._stamps.append(stamp_ns)

    def answer(self, stamp_ns: int) -> None:
        with self._changed:
            for queue in (self._stamps, self._unheard):
                while stamp_ns in queue and queue.popleft() != stamp_ns:
                    pass
            if stamp_ns in self._without:
                self._without.remove(stamp_ns)
                self.answered += 1
            self._silent, self._last_answer_s = False, time.monotonic()
            self._changed.notify_all()

    def wait(self, left_over: int = 0) -> float:
        """Until at most `left_over` frames are out, or nothing is answered in time: then all are given up. In seconds.

        After that none is waited for until an answer comes.
        """
        begun_s = time.monotonic()
        with self._changed:
            self._last_answer_s = begun_s
            while len(self._stamps) > left_over and not self._closing.is_set():
                left_s = 0.0 if self._silent else self._last_answer_s + self._timeout_s - time.monotonic()
                if left_s <= 0:
                    self._silent = True
                    self._stamps.clear()
                    break
                self._changed.wait(min(left_s, _POLL_S))
        return time.monotonic() - begun_s
