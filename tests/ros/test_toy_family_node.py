"""A family that the product does not know: the real node's process serves its chunks."""

import sys
from pathlib import Path

import numpy as np

from tests.core.ros_messages import picture
from tests.demo.materials import tiny_contract
from tests.fake_source import FakeSource
from tests.ros.world import ROOT, World, fresh_domain, process
from tests.toy_family import FOLDERS, engine_of, registered, toy_policy_folder


def test_a_node_serves_the_toy_s_chunks(tmp_path: Path) -> None:
    """Frozen sensors: every chunk must be what the engine decides in this process from the same picture."""
    from calibrator.data.calibration import collect
    from vla_policy.core.observation import Observation
    from vla_policy.core.runner import load_engine

    world = World(fresh_domain(), rate_hz=10.0)
    world.sensors.joints, world.sensors.position, world.sensors.frozen = ("slide", "gripper"), [0.1, 0.02], True
    collect([FakeSource((6, 5))], tmp_path / "calibration", count=6, seed=0)
    with registered(*FOLDERS):
        engine = engine_of(toy_policy_folder(tmp_path / "policy"), tmp_path / "calibration", tmp_path)
        seen = Observation(picture(0, 16), "pick up the red block", np.asarray([0.1, 0.02], np.float32))
        expected = load_engine(engine, threads=1).act(seen).action
    contract = tiny_contract(tmp_path / "contract.yaml")
    command = [sys.executable, str(ROOT / "tests/ros/toy_policy_node.py"), "--ros-args", "-r", "__node:=policy"]
    for name, value in {"engine_path": engine, "contract": contract, "autostart": "true", "engine_threads": 1}.items():
        command += ["-p", f"{name}:={value}"]
    try:
        with process(command, world.domain, tmp_path / "log"):
            world.start_policy()
            world.wait_chunks()
    finally:
        world.close()
    for chunk in world.chunks:
        assert (chunk.horizon, chunk.action_dim, len(chunk.tokens)) == (2, 3, 0)
        np.testing.assert_array_equal(np.reshape(chunk.actions, (2, 3)), expected)
