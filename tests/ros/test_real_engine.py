"""The node with a really built engine: it serves, and refuses one that is damaged or does not fit."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_build.__main__ import main as engine_build
from tests.demo.materials import tiny_contract
from tests.ros.world import CONTRACT, World, fresh_domain, process
from tests.tiny import tiny_policy_folder


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `engine` and its `contract.yaml`."""
    folder = tmp_path_factory.mktemp("real")
    policy = tiny_policy_folder(folder / "policy")
    assert (
        engine_build(["build", "--policy", str(policy), "--uniform", "w8a16_g32", "--out", str(folder / "engine")]) == 0
    )
    tiny_contract(folder / "contract.yaml")
    return folder


@pytest.fixture
def world() -> Iterator[World]:
    made = World(fresh_domain(), rate_hz=10.0)
    made.sensors.joints, made.sensors.position = ("slide", "gripper"), [0.1, 0.02]
    yield made
    made.close()


def command(engine: Path, contract: Path) -> list[str]:
    values = {"engine_path": engine, "contract": contract, "autostart": "true", "engine_threads": 1}
    values["inference_deadline"] = 10.0
    arguments = [item for name, value in values.items() for item in ("-p", f"{name}:={value}")]
    return [sys.executable, "-m", "vla_policy.nodes.policy_node", "--ros-args", "-r", "__node:=policy", *arguments]


def test_a_built_engine_serves(world: World, material: Path, tmp_path: Path) -> None:
    with process(command(material / "engine", material / "contract.yaml"), world.domain, tmp_path / "log"):
        world.wait(lambda: world.node.count_subscribers("instruction") > 0, "the active policy node", 60)
        world.instruct("pick up the red block")
        world.wait_chunks()
        assert (world.chunks[-1].action_dim, len(world.chunks[-1].tokens)) == (3, 3)
        world.wait(lambda: float(world.diagnostics.get("latency p50 (ms)", 0)) > 0, "latencies")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "contract", "reason"),
    [
        (lambda engine: truncate(engine / "decoder.data"), None, "decoder.data"),
        (lambda engine: truncate(engine / "manifest.json"), None, "not valid JSON"),
        (lambda engine: (engine / "vision.onnx").unlink(), None, "vision.onnx"),
        (lambda engine: None, CONTRACT, "the policy takes the states x, gripper_width"),
    ],
)
def test_configure_refuses_a_damaged_or_foreign_engine(
    world: World, material: Path, tmp_path: Path, spoil, contract: Path | None, reason: str
) -> None:
    engine, log = tmp_path / "engine", tmp_path / "log"
    shutil.copytree(material / "engine", engine)
    spoil(engine)
    with process(command(engine, contract or material / "contract.yaml"), world.domain, log) as node:
        world.wait(lambda: "configure refused" in log.read_text(), "the refusal", 60)
        assert reason in log.read_text() and "Traceback" not in log.read_text()
        assert world.state_label() == "unconfigured" and node.poll() is None
