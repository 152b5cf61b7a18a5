"""Child processes that end when they should: in their own session, ended by SIGINT, and by SIGKILL when that fails."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_END_TIMEOUT_S = 10.0


@contextmanager
def running(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Starts `command`, its output to `log`, and ends it when the block is left, however it is left."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        yield process
    finally:
        end(process)


def end(process: "subprocess.Popen[bytes]") -> int:
    """Ends the process as Ctrl-C would; returns its exit status, negative for a signal."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def last_words(log: Path) -> str:
    """The last line that the process wrote, preferring one that names an error; empty when it wrote nothing."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1]
