"""A flow-matching policy on the robot: node, replay and process decide the same chunks, noise included, bit for bit."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from engine_build.__main__ import main as engine_build
from evaluation.__main__ import main as evaluation
from tests.core.ros_messages import picture
from tests.demo.materials import tiny_bag, tiny_contract
from tests.pi05_policy import PI0, tiny_pi05_folder
from tests.ros.world import ROOT, World, fresh_domain, process
from vla_policy.core.flow.noise import entry_of
from vla_policy.core.observation import Observation
from vla_policy.core.runner import load_engine

from vla_policy_interfaces.srv import SetInstruction  # isort: skip  # after the importorskip in tests.ros.world


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `engine` and `pi0`, an engine of each policy, their `contract.yaml` and a `bag` of 20 images."""
    folder = tmp_path_factory.mktemp("pi05_node")
    for name, changes in (("engine", {}), ("pi0", PI0)):
        policy = tiny_pi05_folder(folder / f"{name}_policy", **changes)
        built = ["--policy", str(policy), "--uniform", "w4a16_g32", "--out", str(folder / name)]
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


def command(engine: Path, contract: Path, **more: object) -> list[str]:
    """The node as launch starts it: the shipped parameters, then what is given."""
    shipped = ROOT / "ros2_ws/src/vla_policy/config/policy.params.yaml"
    values = {"engine_path": engine, "contract": contract, "autostart": "true", "engine_threads": 1}
    values |= {"inference_deadline": 10.0, **more}
    given = [part for name, value in values.items() for part in ("-p", f"{name}:={value}")]
    node = [sys.executable, "-m", "vla_policy.nodes.policy_node", "--ros-args", "-r", "__node:=policy"]
    return [*node, "--params-file", str(shipped), *given]


def changed(contract: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = yaml.safe_load(contract.read_text())
    change(content)
    out.write_text(yaml.safe_dump(content))
    return out


def unlimited(content: dict[str, Any]) -> None:
    """Commands that tell their row."""
    for dimension in content["action"]["dimensions"]:
        dimension["limit"] = 100.0


def test_a_node_serves_chunks_that_begin_with_the_bank_s_noise(world: World, material: Path, tmp_path: Path) -> None:
    """Frozen sensors: every chunk must be what the engine decides in this process from the same picture."""
    with process(command(material / "engine", material / "contract.yaml"), world.domain, tmp_path / "log"):
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


def test_the_state_that_a_pi0_node_measures_reaches_its_actions(world: World, material: Path, tmp_path: Path) -> None:
    """The same picture and task in another state: another chunk, each the one that the engine decides here."""
    with process(command(material / "pi0", material / "contract.yaml"), world.domain, tmp_path / "log"):
        world.wait(lambda: world.node.count_subscribers("instruction") > 0, "the active policy node", 60)
        world.instruct("pick up the red block")
        world.wait_chunks()
        before = world.chunks[-1]
        world.sensors.position = [0.9, 0.07]
        world.wait(lambda: world.chunks[-1].actions != before.actions, "another chunk")
        world.wait_chunks()
        after = world.chunks[-1]
    engine = load_engine(material / "pi0", threads=1)
    for chunk, state in ((before, [0.1, 0.02]), (after, [0.9, 0.07])):
        seen = Observation(picture(0, 16), "pick up the red block", np.asarray(state, np.float32))
        np.testing.assert_array_equal(np.reshape(chunk.actions, (4, 3)), engine.act(seen).action)


def test_executed_rows_move_the_robot_while_the_next_chunk_is_made(
    world: World, material: Path, tmp_path: Path
) -> None:
    """Of chunks of 4 rows the policy's 2 are carried out, one after the other, and the next chunk comes meanwhile.

    Frozen sensors: every chunk is the same, so that a command tells its row.
    """
    log = tmp_path / "log"

    contract = changed(material / "contract.yaml", tmp_path / "contract.yaml", unlimited)
    more = {"freeze_timeout": 0.0, "source_timeout": 5.0, "chunk_grace": 0.0, "disarm_after": 0.0}
    with process(command(material / "engine", contract, **more), world.domain, log):
        world.wait(lambda: world.node.count_subscribers("instruction") > 0, "the active policy node", 60)
        world.instruct("pick up the red block")
        world.wait_chunks()
        world.enable()
        world.wait(lambda: len({x for _, m in world.twists if (x := m.twist.linear.x)}) > 1, "both rows", 60)
        world.wait_chunks(10)
        assert world.diagnostics["chunk"] == "4 rows, 2 carried out"
    rows = np.reshape(world.chunks[-1].actions, (4, 3))[:, 0]
    assert len(set(rows.tolist())) == 4, "rows that can be told apart"
    sent = [message.twist.linear.x for _, message in world.twists if message.twist.linear.x]
    assert set(sent) == set(rows[:2].tolist())


def test_an_engine_that_is_slower_than_its_chunk_stands_still_between_chunks(
    world: World, material: Path, tmp_path: Path
) -> None:
    """So many denoising steps that a decision takes longer than the 2 rows at 50 Hz last: each chunk moves the robot by
    its own two rows, once, and nothing moves it until the next comes."""
    policy = tiny_pi05_folder(tmp_path / "policy", num_inference_steps=400)
    engine = tmp_path / "engine"
    assert engine_build(["build", "--policy", str(policy), "--uniform", "w4a16_g32", "--out", str(engine)]) == 0
    log = tmp_path / "log"

    def fast(content: dict[str, Any]) -> None:
        unlimited(content)
        content["action"]["control_rate_hz"] = 50

    contract = changed(material / "contract.yaml", tmp_path / "contract.yaml", fast)
    more = {"freeze_timeout": 0.0, "source_timeout": 5.0, "chunk_grace": 0.0, "disarm_after": 0.0}
    with process(command(engine, contract, **more), world.domain, log):
        world.wait(lambda: world.node.count_subscribers("instruction") > 0, "the active policy node", 60)
        told = [line for line in log.read_text().splitlines() if "the robot will stand still in between" in line]
        assert len(told) == 1 and "what it plans lasts 40 ms (rows carried out: 2)" in told[0]
        world.instruct("pick up the red block")
        world.wait_chunks()
        world.enable()
        world.wait(lambda: int(world.diagnostics["chunks run out"]) > 2, "chunks that ran out", 60)
        assert float(world.diagnostics["latency p50 (ms)"]) > 40
    rows = np.reshape(world.chunks[-1].actions, (4, 3))[:, 0].tolist()
    sent = [message.twist.linear.x for _, message in world.twists]
    assert sent[-1] == 0.0, "the hold that ends a motion"
    runs = [list(run) for moving, run in itertools.groupby(sent, bool) if moving]
    # A command may be lost on the way, best effort as they are sent; none is repeated.
    assert len(runs) > 2 and all(run in (rows[:2], rows[:1], rows[1:2]) for run in runs)


def test_a_prompt_that_is_too_long_is_told_once_and_moves_nothing(
    world: World, material: Path, tmp_path: Path
) -> None:
    """Short enough for the contract, too long for the policy: a fault until another instruction comes."""
    log = tmp_path / "log"
    more = {"freeze_timeout": 0.0, "source_timeout": 5.0, "chunk_grace": 1.0, "disarm_after": 0.0}
    with process(command(material / "engine", material / "contract.yaml", **more), world.domain, log):
        world.wait(lambda: world.node.count_subscribers("instruction") > 0, "the active policy node", 60)
        world.instruct("pick up the red block")
        world.wait_chunks()
        world.enable()
        world.wait_moving()
        world.instruct("a " * 240)
        world.wait_holding("refused_instruction")
        world.wait(lambda: not world.moving, "a hold")
        chunks, images = len(world.chunks), int(world.diagnostics["received camera/image_raw/compressed"])
        world.wait(
            lambda: int(world.diagnostics["received camera/image_raw/compressed"]) > images + 10, "further images"
        )
        assert len(world.chunks) == chunks and not world.moving
        assert world.diagnostics["drops invalid_message"] == "1" and "drops engine_error" not in world.diagnostics
        assert "ids, the policy takes 200; shorten it" in world.diagnostics["last invalid_message"]
        assert sum("the policy takes 200" in line for line in log.read_text().splitlines()) == 1
        answer = world.call(SetInstruction, "/policy/set_instruction", SetInstruction.Request(instruction="a " * 240))
        assert not answer.success and "the policy takes 200" in answer.message
        world.instruct("open the drawer")
        world.wait_moving()
        assert world.chunks[-1].instruction == "open the drawer"


@pytest.mark.parametrize("engine", ["engine", "pi0"])
@pytest.mark.parametrize(
    ("change", "more", "reason"),
    [
        (lambda c: c["action"]["dimensions"].pop(1), {}, "the policy's actions have 3 values; the contract names 2"),
        (
            lambda c: c["action"].update(chunk_rows=5),
            {},
            "chunk_rows: the policy decides 4 actions at once, the contract carries out 5; 0 takes the policy's own 2",
        ),
        (
            lambda c: c["states"][0]["values"].pop(),
            {},
            "the policy takes the states x, gripper_width; the contract gives x",
        ),
        (lambda c: None, {"instruction": "pick " * 300}, "instruction: the prompt has "),
    ],
    ids=["width", "horizon", "state", "prompt"],
)
def test_what_does_not_fit_the_policy_is_one_line_before_the_node_is_active(
    world: World,
    material: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    more: dict[str, object],
    reason: str,
    engine: str,
) -> None:
    contract = changed(material / "contract.yaml", tmp_path / "contract.yaml", change)
    log = tmp_path / "log"
    with process(command(material / engine, contract, check_sources="none", **more), world.domain, log):
        world.wait(lambda: f"configure refused: {'' if more else str(contract)}" in log.read_text(), "the refusal")
        assert world.state_label() == "unconfigured"
    refused = [line for line in log.read_text().splitlines() if "configure refused" in line]
    assert len(refused) == 1 and reason in refused[0] and "Traceback" not in log.read_text()


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
