"""A flow-matching policy on the robot: node and process decide the same chunk, noise included, bit for bit."""

from pathlib import Path

import numpy as np
from pi05_policy import tiny_pi05_folder

from tests.core.ros_messages import picture
from tests.demo.materials import tiny_contract
from tests.ros.world import World, fresh_domain, policy_process


def test_a_node_serves_chunks_from_the_bank_s_noise(tmp_path: Path) -> None:
    """Frozen sensors: every chunk must be what the engine decides in this process from the same picture."""
    from engine_build.build import Request, build
    from vla_policy.core.flow.noise import entry_of
    from vla_policy.core.formats import FULL
    from vla_policy.core.observation import Observation
    from vla_policy.core.runner import load_engine
    from vla_policy.core.targets import find_target

    policy, engine = tiny_pi05_folder(tmp_path / "policy"), tmp_path / "engine"
    build(Request(policy, find_target("cpu"), engine, uniform=FULL))
    world = World(fresh_domain(), rate_hz=10.0)
    world.sensors.joints, world.sensors.position, world.sensors.frozen = ("slide", "gripper"), [0.1, 0.02], True
    seen = Observation(picture(0, 16), "pick up the red block", np.asarray([0.1, 0.02], np.float32))
    loaded = load_engine(engine, threads=1)
    expected = loaded.act(seen).action
    bank = np.load(engine / "noise.npy")
    assert np.array_equal(loaded.policy.inputs(seen)["noise"][0], bank[entry_of(seen, len(bank))])
    contract = tiny_contract(tmp_path / "contract.yaml")
    try:
        with policy_process(world.domain, tmp_path / "log", engine, contract):
            world.start_policy()
            world.wait_chunks()
    finally:
        world.close()
    assert world.chunks
    for chunk in world.chunks:
        assert (chunk.horizon, chunk.action_dim, len(chunk.tokens)) == (4, 3, 0)
        np.testing.assert_array_equal(np.reshape(chunk.actions, (4, 3)), expected)
