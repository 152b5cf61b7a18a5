"""How a node's process ends: in order after a signal, and never with exit code 0 after an error."""

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.ros.world import end, fresh_domain, process

SCRIPT = """
import sys
from contextlib import contextmanager
from rclpy.node import Node
from vla_policy.core.errors import ContractError
from vla_policy.nodes.process import run_node

@contextmanager
def opened(ending):
    node = Node("subject")
    def work():
        {work}
    node.create_timer(0.05, work)
    print("made", flush=True)
    error = None
    try:
        yield node
    except BaseException as raised:
        error = raised
        raise
    finally:
        print(f"closed after {{error!r}}", flush=True)
        {close}

sys.exit(run_node(opened))
"""


def run(
    tmp_path: Path, *arguments: str, work: str = "pass", close: str = "pass", signals: tuple[int, ...] = ()
) -> tuple[int, str]:
    """Exit status and output of a process that lives by `run_node`."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", SCRIPT.format(work=work, close=close), *arguments]
    with process(command, fresh_domain(), log) as child:
        deadline = time.monotonic() + 30
        while "made" not in log.read_text() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in signals[:-1]:
            child.send_signal(number)
        status = end(child, signals[-1]) if signals else child.wait(30)
    return status, log.read_text()


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT, signal.SIGTERM)])
def test_signals_end_in_order(tmp_path: Path, signals: tuple[int, ...]) -> None:
    status, output = run(tmp_path, close="import time; time.sleep(0.5); print('done', flush=True)", signals=signals)
    assert (status, output.count("closed after None"), output.count("done")) == (0, 1, 1), output


def test_signals_in_quick_succession_never_block_the_end(tmp_path: Path) -> None:
    """The second comes while the main thread deals with the first; several tries, for it is a matter of timing."""
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        status, output = run(folder, signals=(signal.SIGINT, signal.SIGINT, signal.SIGTERM))
        assert (status, output.count("closed after None")) == (0, 1), output


def test_signals_while_the_interpreter_ends_change_nothing(tmp_path: Path) -> None:
    """An impatient Ctrl-C: one signal after the other until the process is gone, Python's finalisation included."""
    close = "import os, subprocess; subprocess.Popen(['sh', '-c', f'while kill -INT {{os.getpid()}}; do :; done'])"
    status, output = run(tmp_path, close=close.replace("{{", "{").replace("}}", "}"), signals=(signal.SIGTERM,))
    assert (status, output.count("closed after None")) == (0, 1), output


def test_an_error_in_a_callback_closes_and_ends_with_its_traceback(tmp_path: Path) -> None:
    status, output = run(tmp_path, work="raise RuntimeError('defect')")
    assert status == 1 and "closed after RuntimeError('defect')" in output
    assert "Traceback" in output and "defect" in output.splitlines()[-1]


def test_arguments_that_ros_cannot_read_are_one_line_and_exit_code_two(tmp_path: Path) -> None:
    status, output = run(tmp_path, "--ros-args", "-p", "rate:=")
    assert status == 2 and "error: failed to initialize rcl: Couldn't parse parameter" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("where", ["work", "close"])
def test_a_mistake_is_one_line_and_exit_code_two(tmp_path: Path, where: str) -> None:
    signals = (signal.SIGTERM,) if where == "close" else ()
    status, output = run(tmp_path, **{where: "raise ContractError('no such topic')"}, signals=signals)
    assert status == 2 and "error: no such topic" in output and "Traceback" not in output
