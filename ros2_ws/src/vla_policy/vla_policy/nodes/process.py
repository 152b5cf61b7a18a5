"""How a node's process lives and ends: clean on SIGTERM and on any number of SIGINTs."""

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from vla_policy.core.errors import VlaError


def run_node(
    make: Callable[[], Node],
    close: Callable[[Node], None],
    args: Sequence[str] | None = None,
    done: threading.Event | None = None,
) -> int:
    """Spins the node that `make` creates until SIGINT, SIGTERM or `done`, then calls `close` in the living context.

    rclpy's own handlers would shut the context down first, and the last command could not be published; a second
    SIGINT (terminal plus launch) would interrupt the clean-up. So the signals only set an event here.
    """
    ending = done or threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ending.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    rclpy.init(args=None if args is None else list(args), signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = make()
    except VlaError as error:
        print(f"error: {error}", file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinner = threading.Thread(target=_spin, args=(executor, ending), name="spin", daemon=True)
    spinner.start()
    try:
        ending.wait()
    finally:
        executor.shutdown(timeout_sec=5.0)
        spinner.join(5.0)
        close(node)
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


def _spin(executor: SingleThreadedExecutor, ending: threading.Event) -> None:
    try:
        executor.spin()
    except ExternalShutdownException:
        pass
    finally:
        ending.set()
