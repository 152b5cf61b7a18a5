"""A long run of the real node with a built engine over DDS, as fast as it goes: every frame answered, memory flat.

The suite runs a short one. Thirty minutes of 30 Hz, with the figures:

    VLA_SOAK_FRAMES=54000 tools/with_ros python -m pytest -s tests/ros/test_soak.py
"""

import os
import sys
import time
from pathlib import Path

import pytest

from engine_build.__main__ import main as engine_build
from tests.demo.materials import tiny_contract
from tests.ros.world import World, end, fresh_domain, process
from tests.tiny import tiny_policy_folder

FRAMES = int(os.environ.get("VLA_SOAK_FRAMES", "600"))
# Rolling windows, queues and the runtime's arena fill up first.
WARM_UP = min(5_000, FRAMES // 3)
WINDOW = 16
ALLOWED_KIB = 4_096


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


class Feeder:
    """Publishes frames into a lossless node, at most `WINDOW` ahead of its answers."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sent = 0

    def answered(self) -> int:
        return self._world.chunks[-1].sequence + 1 if self._world.chunks else 0

    def feed(self, frames: int) -> None:
        """Sends `frames` more, and waits for the answer to each."""
        for _ in range(frames):
            self._world.sense()
            self._sent += 1
            self._world.wait(lambda: self.answered() > self._sent - WINDOW, "answers", 120)
        self._world.wait(lambda: self.answered() == self._sent, "the last answer", 120)
        del self._world.chunks[:-1], self._world.twists[:-1], self._world.gripper[:-1]


@pytest.mark.timeout(900 + FRAMES // 5)
def test_every_frame_is_answered_and_memory_stays_flat(tmp_path: Path) -> None:
    policy = tiny_policy_folder(tmp_path / "policy")
    build = ["build", "--policy", str(policy), "--uniform", "w8a16_g32", "--out", str(tmp_path / "engine")]
    assert engine_build(build) == 0
    contract = tiny_contract(tmp_path / "contract.yaml")
    # Work per frame is the subject, not work per control step.
    contract.write_text(contract.read_text().replace("control_rate_hz: 20", "control_rate_hz: 5"))
    values = {"engine_path": tmp_path / "engine", "contract": contract, "autostart": "true", "lossless": "true"}
    values |= {"check_sources": "none", "engine_threads": 1, "inference_deadline": 10.0, "source_timeout": 10.0}
    command = [sys.executable, "-m", "vla_policy.nodes.policy_node", "--ros-args", "-r", "__node:=policy"]
    command += [item for name, value in values.items() for item in ("-p", f"{name}:={value}")]
    world = World(fresh_domain(), rate_hz=None)
    world.sensors.joints, world.sensors.position = ("slide", "gripper"), [0.1, 0.02]
    try:
        with process(command, world.domain, tmp_path / "log") as node:
            for topic in ("instruction", "joint_states", "camera/image_raw/compressed"):
                world.wait(lambda topic=topic: world.node.count_subscribers(topic) > 0, "the active policy node", 60)
            world.instruct("pick up the red block")
            world.wait(lambda: world.diagnostics.get("instruction"), "the instruction's arrival")
            world.enable()
            feeder = Feeder(world)
            feeder.feed(WARM_UP)
            begun_s, before_kib = time.monotonic(), resident_kib(node.pid)
            for _ in range(10):
                feeder.feed((FRAMES - WARM_UP) // 10)
                grown_kib = resident_kib(node.pid) - before_kib
                rate_hz = (feeder.answered() - WARM_UP) / (time.monotonic() - begun_s)
                print(f"{feeder.answered()} frames, {rate_hz:.0f} Hz, {before_kib} + {grown_kib} KiB", flush=True)
                assert grown_kib < ALLOWED_KIB
            drops = [key for key in world.diagnostics if key.startswith("drops ")]
            assert not drops, "every frame was answered"
            assert end(node) == 0, (tmp_path / "log").read_text()
    finally:
        world.close()
