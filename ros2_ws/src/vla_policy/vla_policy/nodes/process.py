"""How a node's process lives and ends: clean on SIGTERM and on any number of SIGINTs."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from vla_policy.core.errors import VlaError


def run_node(
    make: Callable[[threading.Event], Node],
    close: Callable[[Node, BaseException | None], None],
    args: Sequence[str] | None = None,
) -> int:
    """Spins a node until SIGINT, SIGTERM or an error in a callback, then closes it in the living context.

    make: creates the node; the event it gets is set when the process is to end, and may be set by the node itself.
    close: ends the node's work; gets the error that a callback raised, if one did.

    Returns 0, or 2 after one line on stderr for a mistake that the user can mend. Any other error is raised again once
    the node is closed, so that the process ends with a traceback and not with 0.

    rclpy's own handlers would shut the context down first, and the last command could not be published; a second
    SIGINT (terminal plus launch) would interrupt the clean-up. So the signals only set the event here.
    """
    ending = threading.Event()
    _set_by_signals(ending)
    try:
        rclpy.init(args=None if args is None else list(args), signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:  # the command line's ROS arguments cannot be read
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        _live(make(ending), close, ending)
    except (VlaError, ParameterException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        rclpy.try_shutdown()
        # The interpreter gives Python's own handlers up when it ends; a second Ctrl-C would then kill it with a code.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return 0


def _set_by_signals(ending: threading.Event) -> None:
    """From here on SIGINT and SIGTERM set `ending` and do nothing else.

    Not from Python's handler: the main thread runs it only once it is awake, and a signal that another thread of the
    middleware gets does not wake it; and a handler that comes while the main thread is inside the event would wait for
    the event's lock for ever. What the interpreter writes to a pipe is safe in any thread and at any time.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)

    def wait() -> None:
        os.read(reading, 1)
        ending.set()

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _live(node: Node, close: Callable[[Node, BaseException | None], None], ending: threading.Event) -> None:
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    errors: list[BaseException] = []

    def spin() -> None:
        try:
            executor.spin()
        except ExternalShutdownException:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            ending.set()

    spinner = threading.Thread(target=spin, name="spin", daemon=True)
    spinner.start()
    try:
        ending.wait()
        executor.shutdown()
        # A callback that runs (a configure that loads an engine) is waited for: closing beside it would race with it.
        spinner.join()
        close(node, errors[0] if errors else None)
    finally:
        node.destroy_node()
    if errors:
        raise errors[0]
