"""The bond to a lifecycle manager, with the node, the manager and their ends as real processes.

The manager is bondpy's where ROS is installed, and everywhere one after bondcpp's state machine (`bond_manager.py`).
"""

import importlib.util
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ros.interfaces import installed
from tests.ros.world import ROOT, World, fake_engine, node_command, process

from lifecycle_msgs.msg import Transition  # isort: skip  # after the importorskip in tests.ros.world

TIMEOUT_S, SLACK_S = 4.0, 6.0  # a busy machine tells late


@pytest.fixture(scope="module")
def bond(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with installed("bond", tmp_path_factory.mktemp("bond")):
        yield


@pytest.fixture(params=["protocol", "bondpy"])
def manager(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "bondpy":
        pytest.importorskip("bondpy.bondpy", reason="bondpy is in no registry; it comes with ROS")
    return [sys.executable, str(ROOT / "tests/ros/bond_manager.py"), "policy", request.param]


def events(log: Path) -> list[tuple[str, float]]:
    """What the manager has told, without what its libraries say."""
    lines = [line.split() for line in log.read_text().splitlines() if log.exists()]
    known = ("started", "formed", "held", "silent", "ended", "broken", "stranger")
    return [(words[0], float(words[1])) for words in lines if len(words) == 2 and words[0] in known]


def told(world: World, log: Path, *wanted: str) -> float:
    """Waits for one of the events, and gives the time of it."""
    world.wait(lambda: any(event in wanted for event, _ in events(log)), f"{wanted} of {log.read_text()}")
    return next(at_s for event, at_s in events(log) if event in wanted)


@pytest.mark.skipif(importlib.util.find_spec("bond") is not None, reason="bond is installed here")
def test_a_bond_without_its_package_is_refused(world: World, tmp_path: Path) -> None:
    command = node_command(fake_engine(tmp_path / "engine"), autostart=False, bond_heartbeat_period=0.1)
    with process(command, world.domain, tmp_path / "log"):
        assert not world.change_state(Transition.TRANSITION_CONFIGURE)
        world.wait(
            lambda: "the ROS package bond is not installed" in world.diagnostics.get("summary", ""), "the refusal"
        )


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP])
def test_a_node_that_dies_or_hangs_breaks_its_bond(
    world: World, tmp_path: Path, bond: None, manager: list[str], death: signal.Signals
) -> None:
    """After the manager's 4 s, not before."""
    log = tmp_path / "manager"
    command = node_command(fake_engine(tmp_path / "engine"), bond_heartbeat_period=0.1)
    with process(command, world.domain, tmp_path / "log") as node, process(manager, world.domain, log):
        told(world, log, "held")
        assert not {event for event, _ in events(log)} & {"silent", "ended", "broken"}
        node.send_signal(death)
        killed_s = time.monotonic()
        after_s = told(world, log, "silent", "ended", "broken") - killed_s
        assert events(log)[-1][0] in ("silent", "broken") and TIMEOUT_S - 0.5 < after_s < TIMEOUT_S + SLACK_S


def test_a_bond_lasts_as_long_as_the_node_is_active(
    world: World, tmp_path: Path, bond: None, manager: list[str]
) -> None:
    """Its end by deactivation is meant, and told at once; the next activation's bond is another one."""
    log = tmp_path / "log"
    command = node_command(fake_engine(tmp_path / "engine"), bond_heartbeat_period=0.1)
    with process(command, world.domain, log):
        for turn in ("first", "second"):
            heard = tmp_path / turn
            with process(manager, world.domain, heard):
                told(world, heard, "held")
                begun_s = time.monotonic()
                assert world.change_state(Transition.TRANSITION_DEACTIVATE)
                assert told(world, heard, "silent", "ended", "broken") - begun_s < TIMEOUT_S
            assert [event for event, _ in events(heard)][-1] in ("ended", "broken")
            assert "stranger" not in heard.read_text()
            assert world.change_state(Transition.TRANSITION_ACTIVATE)
    assert log.read_text().count("bond: held with a lifecycle manager") == 2


def test_a_manager_that_dies_is_told_of_and_its_successor_is_heard(world: World, tmp_path: Path, bond: None) -> None:
    log, protocol = tmp_path / "log", [sys.executable, str(ROOT / "tests/ros/bond_manager.py"), "policy", "protocol"]
    command = node_command(fake_engine(tmp_path / "engine"), bond_heartbeat_period=0.1)
    with process(command, world.domain, log):
        with process(protocol, world.domain, tmp_path / "first"):
            told(world, tmp_path / "first", "held")
        world.wait(lambda: "bond: no lifecycle manager was heard for 4 s" in log.read_text(), "the warning")
        assert world.state_label() == "active"
        with process(protocol, world.domain, tmp_path / "second"):
            told(world, tmp_path / "second", "held")
            world.wait(lambda: log.read_text().count("bond: held with") == 2, "the node's word")
