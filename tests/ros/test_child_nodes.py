"""Nodes that a command starts: their parameters, and that none outlives it."""

import signal
import subprocess
import sys
from pathlib import Path

import yaml

from evaluation.processes import node_command
from tests.ros.world import ROOT, TIMEOUT_S

SCRIPT = """
import sys
from evaluation.processes import ended_in_order, running

with ended_in_order(), running([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
    print(child.pid, flush=True)
    child.wait()
"""


def test_a_command_that_is_terminated_ends_its_nodes() -> None:
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(TIMEOUT_S) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{child}").exists()


def test_parameters_keep_their_types() -> None:
    """A task that reads like a number or a boolean stays a text."""
    values = {"task": "yes", "name": "", "tasks": ["1", "b: c"], "trials": [0, 1], "rate": 1.0, "bag": Path("/a b")}
    command = node_command("module", values, Path("/p.yaml"))
    assert command[:6] == [sys.executable, "-m", "module", "--ros-args", "--params-file", "/p.yaml"]
    found = dict(item.split(":=", 1) for item in command[7::2])
    assert {name: yaml.safe_load(text) for name, text in found.items()} == values | {"bag": "/a b"}
