"""Which frames of a replay are still waited for."""

import threading
import time

from vla_policy.nodes.unanswered import Unanswered


def sent(timeout_s: float, *stamps: int) -> Unanswered:
    frames = Unanswered(timeout_s, threading.Event())
    for stamp in stamps:
        go(frames, stamp)
    return frames


def go(frames: Unanswered, stamp: int) -> None:
    frames.send(stamp)
    frames.expect(stamp)


def test_an_answer_says_that_earlier_frames_have_none() -> None:
    frames = sent(60.0, 1, 2, 3, 4)
    frames.answer(3)
    assert frames.wait(1) < 30, "only the fourth is out"
    assert (frames.sent, frames.answered) == (4, 1)
    frames.answer(2)  # late all the same
    frames.answer(2)
    frames.answer(9)
    assert (frames.sent, frames.answered) == (4, 2)


def test_a_stamp_may_come_twice() -> None:
    frames = sent(60.0, 1, 2)
    frames.answer(1)
    go(frames, 1)
    frames.answer(2)
    assert frames.wait(1) < 30
    frames.answer(1)
    assert frames.wait() < 30 and frames.answered == 3


def test_an_image_whose_state_is_still_to_come_is_not_waited_for() -> None:
    frames = sent(60.0)
    for stamp in range(20):
        frames.send(stamp)
    assert frames.wait() < 30
    frames.expect(0)
    frames.answer(0)
    frames.expect(0)  # answered before this end knew that it was complete
    assert frames.wait() < 30 and (frames.sent, frames.answered) == (20, 1)


def test_after_one_silence_nothing_is_waited_for_until_an_answer_comes() -> None:
    frames = sent(0.2, 1)
    assert frames.wait() >= 0.2
    go(frames, 2)
    begun_s = time.monotonic()
    assert frames.wait() < 0.2 and time.monotonic() - begun_s < 0.2
    frames.answer(2)
    go(frames, 3)
    assert frames.wait() >= 0.2, "it answers again"
