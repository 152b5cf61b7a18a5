"""How a node's process lives and ends: clean on SIGTERM and on any number of SIGINTs."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from vla_policy.core.errors import VlaError


def run_node(
    open_node: Callable[[threading.Event], AbstractContextManager[Node]], args: Sequence[str] | None = None
) -> int:
    """Spins a node until SIGINT, SIGTERM or an error in a callback, then closes it in the living context.

    open_node: gives the node, and ends its work when it is left, by the error that a callback raised if one did. The
    event it gets is set when the process is to end, and may be set by the node itself.

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
        _live(open_node(ending), ending)
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


def _live(opened: AbstractContextManager[Node], ending: threading.Event) -> None:
    with ExitStack() as destroying, opened as node:
        destroying.callback(node.destroy_node)
        _spin(node, ending)


def _spin(node: Node, ending: threading.Event) -> None:
    """Until `ending` is set. Raises what a callback raised."""
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
    ending.wait()
    executor.shutdown()
    # A callback that runs (a configure that loads an engine) is waited for: closing beside it would race with it.
    spinner.join()
    if errors:
        raise errors[0]
