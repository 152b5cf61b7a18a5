"""ROS nodes as child processes, started with the command lines that launch generates for them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from vla_policy.core.errors import ArtefactError

_END_TIMEOUT_S = 30.0
Value = bool | int | float | str | Path | Sequence[str] | Sequence[int]


def node_command(module: str, parameters: Mapping[str, Value], params_file: Path | None = None) -> list[str]:
    """The command line of a node in the Python module `module`; `parameters` win over `params_file`."""
    files = [] if params_file is None else ["--params-file", str(params_file)]
    # Parameters are YAML, of which JSON is a part: quoted, a text cannot be taken for a number or a boolean.
    texts = {name: json.dumps(value, default=str) for name, value in parameters.items()}
    values = [item for name, text in texts.items() for item in ("-p", f"{name}:={text}")]
    return [sys.executable, "-m", module, "--ros-args", *files, *values]


def shared_file(name: str) -> Path:
    """A configuration file that the package vla_policy installs. Raises ArtefactError where ROS does not know it."""
    try:
        from ament_index_python.packages import get_package_share_directory

        return Path(get_package_share_directory("vla_policy")) / "config" / name
    except LookupError as error:
        raise ArtefactError("ROS package vla_policy: not on AMENT_PREFIX_PATH; run under tools/with_ros") from error
    except ModuleNotFoundError as error:
        raise ArtefactError("ROS 2 is not installed here; this command starts ROS nodes") from error


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Inside, SIGTERM ends this process as an error would: what it has started is ended too."""
    former = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def running(
    command: Sequence[str], log: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Starts a node in the caller's ROS domain, or one of this process's own, and ends it when the block is left.

    log: where its output goes; by default where this process's goes. environment: what it sees beside this process's.
    In a session of its own, so that an interrupt from the keyboard reaches it once, from here.
    """
    defaults = {
        "ROS_DOMAIN_ID": str(1 + os.getpid() % 100),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "FASTRTPS_DEFAULT_PROFILES_FILE": str(shared_file("fastdds_large_images.xml")),
    }
    with log.open("wb") if log else nullcontext() as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            env={**defaults, **os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process)


def end(process: "subprocess.Popen[bytes]") -> int:
    """Ends a node as Ctrl-C would; returns its exit status, negative for a signal."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()
