"""The simulated robot in the loop: over DDS, step for step what the simulator does without ROS."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("libero", reason="needs the libero extra: pip install 'vla-deploy[libero]'")

from engine_build.__main__ import main as engine_build
from evaluation.benchmarks.libero import DEMO_PROTOCOL, LiberoEnv
from evaluation.robot.session import main as session
from tests.ros.fake_policy_node import echo
from tests.ros.world import CONTRACT, ROOT, fake_engine, fresh_domain, node_command, process
from vla_policy.core.bag import open_bag, read_frames
from vla_policy.core.contract import load_contract
from vla_policy.core.observe import observe
from vla_policy.core.runner import load_engine
from vla_policy.core.served import read_served
from vla_policy.core.synchroniser import Frame

TASK = "pick_up_the_butter_and_place_it_in_the_basket"
DECISIONS = 8


def test_one_command_records_whole_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The expert's; a bag that would hold a failure is not written, one that is there not overwritten unasked."""
    monkeypatch.setenv("ROS_DOMAIN_ID", str(fresh_domain()))
    bag, contract = tmp_path / "bag", load_contract(CONTRACT)
    command = ["--expert", "--tasks", TASK, "--trials", "0", "--bag", str(bag)]
    assert session([*command, "--max-steps", "8"]) == 1
    assert "not written, as not every episode succeeded" in capfd.readouterr().err and list(tmp_path.iterdir()) == []
    assert session(command) == 0
    assert sorted(path.name for path in bag.iterdir()) == ["bag.mcap", "metadata.yaml"]
    frames = [frame for frame in read_frames(bag, contract) if isinstance(frame, Frame)]
    assert len(frames) > 10 and {frame.episode for frame in frames} == {0}
    assert session(command) == 2
    assert "exists already; add --replace" in capfd.readouterr().err and list(tmp_path.iterdir()) == [bag]


def test_the_loop_over_dds_equals_the_loop_without(tmp_path: Path) -> None:
    domain, log = fresh_domain(), tmp_path / "log"
    engine = fake_engine(tmp_path / "engine", action="echo")
    settings = {"use_sim_time": True, "enabled": True, "check_sources": "graph", "source_wait": 120.0}
    settings |= {"freeze_timeout": 0.0, "output_watchdog_timeout": 30.0, "inference_deadline": 5.0}
    recorder = [sys.executable, "-m", "vla_policy.nodes.record_node", "--ros-args", "-p", "use_sim_time:=true"]
    recorder += ["-p", f"output:={tmp_path / 'bag'}", "-p", f"contract:={CONTRACT}"]
    robot = [sys.executable, "-m", "evaluation.robot", "--ros-args", "-p", f"contract:={CONTRACT}"]
    robot += ["-p", f"tasks:=[{TASK}]", "-p", "trials:=[3]", "-p", f"max_steps:={4 * DECISIONS}"]
    robot += ["-p", "min_subscribers:=2", "-p", f"summary:={tmp_path / 'summary.json'}"]
    with (
        process(node_command(engine, **settings), domain, log),
        process(recorder, domain, log) as recording,
        process(robot, domain, log) as simulation,
    ):
        assert simulation.wait(240) == 1, f"echoed states solve nothing; {log.read_text()}"
        recording.send_signal(signal.SIGINT)
        assert recording.wait(30) == 0, log.read_text()
    (episode,) = json.loads((tmp_path / "summary.json").read_text())["episodes"]
    outcome = {"task": TASK, "trial": 3, "success": False, "steps": 4 * DECISIONS}
    assert episode == outcome | {"steps_without_command": 0}

    contract = load_contract(CONTRACT)
    frames = [frame for frame in read_frames(tmp_path / "bag", contract) if isinstance(frame, Frame)]
    assert len(frames) == DECISIONS
    env = LiberoEnv("libero_object", DEMO_PROTOCOL)
    try:
        observation = env.reset(TASK, 3, seed=0)
        for frame in frames:
            seen = observe(frame, contract)
            assert seen.instruction == observation.instruction
            assert seen.state is not None and observation.state is not None
            np.testing.assert_allclose(seen.state, observation.state, atol=1e-6)
            np.testing.assert_allclose(seen.image.astype(int), observation.image, atol=2)
            observation = env.step(echo(observation)).observation
    finally:
        env.close()


def test_a_flow_matching_policy_drives_the_simulated_robot(tmp_path: Path) -> None:
    """The small pi0.5: the session is the rollout. What it sees, what it decides and what moves the robot at every
    control step are, bit for bit, those of the engine in LIBERO without ROS, also where an action lies beyond 1."""
    domain, log, engine = fresh_domain(), tmp_path / "log", tmp_path / "engine"
    policy = ROOT / "demo/policies/libero_object_pi05"
    assert engine_build(["build", "--policy", str(policy), "--uniform", "w8a16_g64", "--out", str(engine)]) == 0
    settings = {"use_sim_time": True, "enabled": True, "autostart": True, "check_sources": "graph"}
    settings |= {"source_wait": 120.0, "freeze_timeout": 0.0, "output_watchdog_timeout": 30.0}
    settings |= {"inference_deadline": 5.0, "engine_threads": 1}
    node = [sys.executable, "-m", "vla_policy.nodes.policy_node", "--ros-args", "-p", f"engine_path:={engine}"]
    node += ["-p", f"contract:={CONTRACT}"]
    node += [part for name, value in settings.items() for part in ("-p", f"{name}:={str(value).lower()}")]
    recorder = [sys.executable, "-m", "vla_policy.nodes.record_node", "--ros-args", "-p", "use_sim_time:=true"]
    recorder += ["-p", f"output:={tmp_path / 'bag'}", "-p", f"contract:={CONTRACT}"]
    recorder += ["-p", "topics:=[action_chunk, cmd_twist]"]
    robot = [sys.executable, "-m", "evaluation.robot", "--ros-args", "-p", f"contract:={CONTRACT}"]
    robot += ["-p", f"tasks:=[{TASK}]", "-p", "trials:=[0]", "-p", f"max_steps:={4 * DECISIONS}"]
    robot += ["-p", "min_subscribers:=2", "-p", f"summary:={tmp_path / 'summary.json'}"]
    with (
        process(node, domain, log),
        process(recorder, domain, log) as recording,
        process(robot, domain, log) as simulation,
    ):
        assert simulation.wait(240) == 1, f"not in so few steps; {log.read_text()}"
        recording.send_signal(signal.SIGINT)
        assert recording.wait(30) == 0, log.read_text()
    (episode,) = json.loads((tmp_path / "summary.json").read_text())["episodes"]
    assert episode["steps_without_command"] == 0
    contract, actor = load_contract(CONTRACT), load_engine(engine, threads=1)
    frames = [frame for frame in read_frames(tmp_path / "bag", contract) if isinstance(frame, Frame)]
    served = {chunk.stamp_ns: chunk.actions for chunk in read_served(tmp_path / "bag")}
    assert len(frames) == len(served) == DECISIONS
    with open_bag(tmp_path / "bag") as bag:
        channels = [channel for channel in bag.channels if channel.topic.endswith("cmd_twist")]
        twists = [bag.decode(recorded).twist for recorded in bag.messages(channels)]
    heard = [[part.x, part.y, part.z] for part in (twist.linear for twist in twists)]
    heard = heard[next(number for number, values in enumerate(heard) if any(values)) :]
    env, beyond = LiberoEnv("libero_object", DEMO_PROTOCOL), 0
    try:
        observation = env.reset(TASK, 0, seed=0)
        for number, frame in enumerate(frames):
            seen = observe(frame, contract)
            np.testing.assert_array_equal(seen.image, observation.image)
            np.testing.assert_array_equal(seen.state, observation.state)
            decided = actor.act(observation).action
            assert decided.shape == (4, 7)
            np.testing.assert_array_equal(served[frame.stamp_ns], decided)
            np.testing.assert_array_equal(heard[4 * number : 4 * number + 4], [decided[0, :3]] * 4)
            beyond += bool((np.abs(decided[0, :3]) > 1).any())
            observation = env.step(decided[0]).observation
    finally:
        env.close()
    assert beyond, "actions that LIBERO's controller cuts"
