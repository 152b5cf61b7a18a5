"""A flow-matching policy on the robot: node, replay and process decide the same chunks, noise included, bit for bit."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine_build.__main__ import main as engine_build
from evaluation.__main__ import main as evaluation
from tests.core.ros_messages import picture
from tests.demo.materials import tiny_bag, tiny_contract
from tests.pi05_policy import tiny_pi05_folder
from tests.ros.world import World, fresh_domain, process
from vla_policy.core.flow.noise import entry_of
from vla_policy.core.observation import Observation
from vla_policy.core.runner import load_engine


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `engine`, its `contract.yaml` and a `bag` of 20 images."""
    folder = tmp_path_factory.mktemp("pi05_node")
    policy = tiny_pi05_folder(folder / "policy")
    built = ["--policy", str(policy), "--uniform", "w4a16_g32", "--out", str(folder / "engine")]
    assert engine_build(["build", *built]) == 0
    tiny_contract(folder / "contract.yaml")
    tiny_bag(folder / "bag")
    return folder


@pytest.fixture
def world() -> Iterator[World]:
    made = World(fresh_domain(), rate_hz=10.0)
    made.sensors.joints, made.sensors.position, made.sensors.frozen = ("slide", "gripper"), [0.1, 0.02], True
    yield made
    made.close()


def test_a_node_serves_chunks_that_begin_with_the_bank_s_noise(world: World, material: Path, tmp_path: Path) -> None:
    """Frozen sensors: every chunk must be what the engine decides in this process from the same picture."""
    values = {"engine_path": material / "engine", "contract": material / "contract.yaml", "autostart": "true"}
    command = [sys.executable, "-m", "vla_policy.nodes.policy_node", "--ros-args", "-r", "__node:=policy"]
    for name, value in {**values, "engine_threads": 1, "inference_deadline": 10.0}.items():
        command += ["-p", f"{name}:={value}"]
    with process(command, world.domain, tmp_path / "log"):
        world.wait(lambda: world.node.count_subscribers("instruction") > 0, "the active policy node", 60)
        world.instruct("pick up the red block")
        world.wait_chunks()
        world.wait(lambda: int(world.diagnostics.get("chunks", 0)) > 0, "diagnostics of some decisions")
    assert float(world.diagnostics["latency p50 (ms)"]) > 0
    engine = load_engine(material / "engine", threads=1)
    seen = Observation(picture(0, 16), "pick up the red block", np.asarray([0.1, 0.02], np.float32))
    bank = np.load(material / "engine/noise.npy")
    assert np.array_equal(engine.policy.inputs(seen)["noise"][0], bank[entry_of(seen, len(bank))])
    expected = engine.act(seen).action
    for chunk in world.chunks:
        assert (chunk.horizon, chunk.action_dim, len(chunk.tokens)) == (4, 3, 0)
        np.testing.assert_array_equal(np.reshape(chunk.actions, (4, 3)), expected)


def test_a_live_replay_finds_the_decisions_of_the_same_engine_in_process(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every frame has a noise of its own, which node and process must choose alike."""
    monkeypatch.setenv("ROS_DOMAIN_ID", str(fresh_domain()))
    thresholds = tmp_path / "thresholds.yaml"
    thresholds.write_text("kind: replay_thresholds\nschema_version: 1\nidentical: true\nmax_drops: 0\n")
    command = ["replay", "--bag", str(material / "bag"), "--contract", str(material / "contract.yaml"), "--live"]
    command += ["--engine", str(material / "engine"), "--thresholds", str(thresholds), "--out", str(tmp_path / "out")]
    assert evaluation([*command, "--rate", "0"]) == 0
    content = json.loads((tmp_path / "out/replay.json").read_text())
    assert content["candidate"]["frames"] == content["comparison"]["identical_frames"] == 20
