"""The node with a really built engine: it serves, and refuses one that is damaged or does not fit."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from engine_build.__main__ import main as engine_build
from evaluation.__main__ import main as evaluation
from tests.core.ros_messages import picture
from tests.demo.materials import tiny_bag, tiny_contract
from tests.ros.world import CONTRACT, WRIST, World, fresh_domain, process
from tests.tiny import overflowing_policy_folder, tiny_policy_folder, with_two_statistics
from vla_policy.core.backends.openvino import Precision
from vla_policy.core.backends.openvino.graphs import check_processor
from vla_policy.core.bag import open_bag
from vla_policy.core.contract import STRING
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file
from vla_policy.core.observation import Observation
from vla_policy.core.processor import cpu_name
from vla_policy.core.recording import BagWriter, recorded_qos
from vla_policy.core.runner import load_engine
from vla_policy.core.served import ACTION_CHUNK, read_served

from lifecycle_msgs.msg import Transition  # isort: skip  # after the importorskip in tests.ros.world
from vla_policy.nodes.recording import definition_of  # isort: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `engine`, its `contract.yaml` and a `bag` of 20 images."""
    folder = tmp_path_factory.mktemp("real")
    policy = tiny_policy_folder(folder / "policy")
    assert (
        engine_build(["build", "--policy", str(policy), "--uniform", "w8a16_g32", "--out", str(folder / "engine")]) == 0
    )
    tiny_contract(folder / "contract.yaml")
    tiny_bag(folder / "bag")
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
        world.wait(lambda: int(world.diagnostics.get("chunks", 0)) > 10, "diagnostics of some decisions")
    values, camera = world.diagnostics, "camera/image_raw/compressed"
    assert values["engine"] == sha256_file(material / "engine/manifest.json") == world.chunks[-1].engine_id
    assert values["engine notes"].startswith(f"runs on {cpu_name()}; ")
    assert "conventions not checked: built without a plan and without states" in values["engine notes"]
    assert values["contract"] == sha256_file(material / "contract.yaml")
    assert 0 < float(values[f"rate {camera} (Hz)"]) < 15 and int(values[f"received {camera}"]) >= int(values["chunks"])
    assert 0 <= float(values[f"age {camera} (ms)"]) < 5_000 and "age joint_states (ms)" in values
    for name in ("latency", "age", "overhead"):
        p50, p99, most = (float(values[f"{name} {what} (ms)"]) for what in ("p50", "p99", "max"))
        assert p50 <= p99 <= most and most > 0, name
    assert values["latch"] == "" and values["holding"] == "disabled, not_started" and values["enabled"] == "False"


@pytest.mark.parametrize("hidden", ["onnxruntime", "tokenizers"])
def test_a_missing_module_is_one_line_with_the_command(
    world: World, material: Path, tmp_path: Path, hidden: str
) -> None:
    log = tmp_path / "log"
    parameters = command(material / "engine", material / "contract.yaml")[3:]
    hiding = [sys.executable, "-c", without(hidden, "policy_node"), *parameters]
    with process(hiding, world.domain, log):
        reason = f"configure refused: the Python package {hidden} is not installed"
        world.wait(lambda: reason in world.diagnostics.get("summary", ""), "the refusal")
    assert 'pip install "numpy<2" onnxruntime' in log.read_text() and "Traceback" not in log.read_text()


@pytest.mark.parametrize("node", ["replay_node", "record_node"])
def test_a_bag_s_node_without_its_module_is_one_line_too(tmp_path: Path, node: str) -> None:
    log = tmp_path / "log"
    with process([sys.executable, "-c", without("rosbags", node)], fresh_domain(), log) as child:
        assert child.wait(60) == 2
    assert log.read_text().startswith("error: the Python package rosbags is not installed")
    assert log.read_text().count("\n") == 1


def without(hidden: str, node: str) -> str:
    """A program that starts the node where one package is not installed."""
    return f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
from vla_policy.nodes.start import {node}
sys.exit({node}())
"""


def test_an_oft_engine_serves_chunks_from_two_cameras(world: World, tmp_path: Path) -> None:
    """Frozen sensors: every chunk must be what the engine decides in this process from the same pictures."""
    policy, engine = tiny_policy_folder(tmp_path / "policy", images=2, chunk=4), tmp_path / "engine"
    assert engine_build(["build", "--policy", str(policy), "--uniform", "w4a16_g32", "--out", str(engine)]) == 0
    content = yaml.safe_load(tiny_contract(tmp_path / "contract.yaml").read_text())
    content["cameras"].append(WRIST)
    (tmp_path / "contract.yaml").write_text(yaml.safe_dump(content))
    world.sensors.frozen = True
    with process(command(engine, tmp_path / "contract.yaml"), world.domain, tmp_path / "log"):
        world.wait(lambda: world.node.count_subscribers("instruction") > 0, "the active policy node", 60)
        world.instruct("pick up the red block")
        world.wait_chunks()
    state = np.asarray(world.sensors.position, np.float32)
    seen = Observation(picture(0, 16), "pick up the red block", state, (picture(0, 8),))
    expected = load_engine(engine, threads=1).act(seen).action
    for chunk in world.chunks:
        assert (chunk.horizon, chunk.action_dim, len(chunk.tokens)) == (4, 3, 0)
        np.testing.assert_array_equal(np.reshape(chunk.actions, (4, 3)), expected)


def test_the_node_asks_which_statistics(
    world: World, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configure lists them in one line; the parameter names one. A live replay hands its option on to the node."""
    policy, engine = with_two_statistics(tiny_policy_folder(tmp_path / "policy")), tmp_path / "engine"
    assert engine_build(["build", "--policy", str(policy), "--uniform", "w8a16_g32", "--out", str(engine)]) == 0
    contract, log = material / "contract.yaml", tmp_path / "log"
    with process([*command(engine, contract), "-p", "autostart:=false"], world.domain, log):
        assert not world.change_state(Transition.TRANSITION_CONFIGURE)
        assert "configure refused: the policy has statistics of 2 data sets and none was named; " in log.read_text()
        assert "choose an unnorm_key: large, tiny\n" in log.read_text() and "Traceback" not in log.read_text()
        assert world.set_parameters(unnorm_key="large").successful
        assert world.change_state(Transition.TRANSITION_CONFIGURE)
    monkeypatch.setenv("ROS_DOMAIN_ID", str(fresh_domain()))
    replay = ["replay", "--bag", str(material / "bag"), "--contract", str(contract), "--live", "--rate", "0"]
    replay += ["--engine", str(engine), "--unnorm-key", "large", "--out", str(tmp_path / "out")]
    assert evaluation(replay) == 0
    content = json.loads((tmp_path / "out/replay.json").read_text())
    assert content["comparison"]["identical_frames"] == content["comparison"]["frames"] == 20
    served = np.stack([action.actions for action in read_served(tmp_path / "out/served")])
    assert np.abs(served[..., 1]).max() > 0.5, "beyond what the other statistics allow"


def test_one_command_replays_live_and_finds_the_decisions_of_the_same_engine_in_process(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fast as the node answers; the result of a former run, its recording included, is replaced."""
    monkeypatch.setenv("ROS_DOMAIN_ID", str(fresh_domain()))
    thresholds = tmp_path / "thresholds.yaml"
    thresholds.write_text("kind: replay_thresholds\nschema_version: 1\nidentical: true\nmax_drops: 0\n")
    command = ["replay", "--bag", str(material / "bag"), "--contract", str(material / "contract.yaml"), "--live"]
    command += ["--engine", str(material / "engine"), "--thresholds", str(thresholds), "--out", str(tmp_path / "out")]
    for _ in range(2):
        assert evaluation([*command, "--rate", "0"]) == 0
    assert (tmp_path / "out/served/metadata.yaml").is_file()
    content = json.loads((tmp_path / "out/replay.json").read_text())
    assert content["candidate"]["frames"] == content["comparison"]["identical_frames"] == 20
    assert evaluation([*command, "--served", str(tmp_path / "out/served")]) == 2
    one = first_of(tmp_path / "out/served", tmp_path / "one")
    command.remove("--live")
    assert evaluation([*command[:-1], str(tmp_path / "whole"), "--served", str(tmp_path / "out/served")]) == 0
    assert evaluation([*command[:-1], str(tmp_path / "part"), "--served", str(one)]) == 1
    content = json.loads((tmp_path / "part/replay.json").read_text())
    assert (content["comparison"]["identical_frames"], content["comparison"]["only_candidate"]) == (1, 19)
    failed = [item["name"] for item in content["checks"] if not item["passed"]]
    assert failed == ["drops of the reference", "unmatched frames", "identical"]


@pytest.mark.parametrize("backend", ["openvino", "openvino_bf16"])
def test_an_openvino_engine_serves_what_it_decides_in_process(
    backend: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    if why := lacks_bfloat16() if backend == "openvino_bf16" else "":
        pytest.skip(why)
    monkeypatch.setenv("ROS_DOMAIN_ID", str(fresh_domain()))
    engine = tmp_path / "engine"
    built = ["build", "--policy", str(material / "policy"), "--uniform", "w4a16_g32", "--backend", backend]
    assert engine_build([*built, "--out", str(engine)]) == 0
    replay = ["replay", "--bag", str(material / "bag"), "--contract", str(material / "contract.yaml"), "--live"]
    assert evaluation([*replay, "--rate", "0", "--engine", str(engine), "--out", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out/replay.json").read_text())
    assert content["candidate"]["frames"] == content["comparison"]["identical_frames"] == 20
    first = next(iter(read_served(tmp_path / "out/served")))
    assert first.engine_id == sha256_file(engine / "manifest.json")


def lacks_bfloat16() -> str:
    """Why bfloat16 cannot be tested here."""
    try:
        check_processor(Precision.BFLOAT16)
    except ArtefactError as error:
        return str(error)
    return ""


def first_of(served: Path, path: Path) -> Path:
    """A bag with the first decision of another one."""
    with (
        open_bag(served) as bag,
        BagWriter(path, definitions={ACTION_CHUNK: definition_of(ACTION_CHUNK)}) as writer,
    ):
        message = next(bag.messages(bag.channels))
        writer.add_topic(message.channel.topic, ACTION_CHUNK, recorded_qos(True, False, 10))
        writer.write(message.channel.topic, message.time_ns, message.data)
    return path


def test_a_bag_that_tells_no_task_is_replayed_live_with_one(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", str(fresh_domain()))
    bag = without_task(material / "bag", tmp_path / "bag")
    command = ["replay", "--bag", str(bag), "--contract", str(material / "contract.yaml"), "--live", "--rate", "0"]
    command += ["--engine", str(material / "engine"), "--out", str(tmp_path / "out")]
    assert evaluation(command) == 2
    assert "no topic /instruction" in (error := capfd.readouterr().err) and "(--instruction)" in error
    assert evaluation([*command, "--instruction", "pick up the red block"]) == 0
    content = json.loads((tmp_path / "out/replay.json").read_text())
    assert content["comparison"]["identical_frames"] == content["comparison"]["frames"] == 20
    assert {action.instruction for action in read_served(tmp_path / "out/served")} == {"pick up the red block"}


def without_task(bag: Path, path: Path) -> Path:
    with open_bag(bag) as recorded, BagWriter(path) as writer:
        for message in recorded.messages(recorded.channels):
            channel = message.channel
            if channel.type != STRING:
                writer.add_topic(channel.topic, channel.type, recorded_qos(True, False, 10))
                writer.write(channel.topic, message.time_ns, message.data)
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def retarget(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target": "a100"}))


def escape(path: Path) -> None:
    """Names files of another engine, every hash right."""
    path.write_text(path.read_text().replace('"decoder.onnx"', '"../engine/decoder.onnx"'))


def link(path: Path) -> None:
    outside = path.parent.with_suffix(".moved")
    path.rename(outside)
    path.symlink_to(outside)


def forget(path: Path) -> None:
    content = json.loads(path.read_text())
    del content["files"]["decoder.data"]
    path.write_text(json.dumps(content))


def test_configure_refuses_a_damaged_or_foreign_engine(world: World, material: Path, tmp_path: Path) -> None:
    """One after the other in one process, and the undamaged engine at the end."""
    log, contract = tmp_path / "log", str(material / "contract.yaml")

    def configured(engine: Path, contract: str) -> bool:
        assert world.set_parameters(engine_path=str(engine), contract=contract).successful
        return world.change_state(Transition.TRANSITION_CONFIGURE)

    with process([*command(material / "engine", Path(contract)), "-p", "autostart:=false"], world.domain, log):
        for name, spoil, reason in (
            ("decoder.data", truncate, "decoder.data"),
            ("decoder.data", alter, "decoder.data: sha256 differs"),
            ("manifest.json", truncate, "not valid JSON"),
            ("manifest.json", retarget, "target a100 runs on"),
            ("vision.onnx", Path.unlink, "vision.onnx: missing"),
            ("manifest.json", escape, "an artefact names the file '../engine/decoder.onnx'"),
            ("decoder.data", link, "decoder.data: links to"),
            ("manifest.json", forget, "decoder.onnx needs 'decoder.data', of which the manifest has no hash"),
        ):
            engine = tmp_path / f"{spoil.__name__}_{name}"
            shutil.copytree(material / "engine", engine)
            spoil(engine / name)
            assert not configured(engine, contract) and reason in log.read_text(), reason
        assert not configured(material / "engine", str(CONTRACT))
        assert "the policy takes the states x, gripper_width" in log.read_text()
        assert configured(material / "engine", contract)
    assert log.read_text().count("configure refused") == 9 and "Traceback" not in log.read_text()


def test_an_engine_that_overflows_holds_and_latches(world: World, tmp_path: Path) -> None:
    """Finite weights, finite at the warm-up and where the arm begins; beyond, the engine's output is not finite."""
    policy, engine = overflowing_policy_folder(tmp_path / "policy"), tmp_path / "engine"
    assert engine_build(["build", "--policy", str(policy), "--uniform", "w16a16", "--out", str(engine)]) == 0
    contract, log = tiny_contract(tmp_path / "contract.yaml"), tmp_path / "log"
    with process(command(engine, contract), world.domain, log) as node:
        world.start_policy()
        world.sensors.position = [1.0, 0.1]
        world.wait_holding("the engine failed: normalised actions: 12 of 12 values are not finite")
        world.wait_dropped("engine_error", "normalised actions: 12 of 12 values are not finite")
        world.sensors.position = [0.1, 0.02]
        world.wait_chunks()
        assert not world.moving, "answered again, but only the operator takes the latch back"
        assert np.isfinite([chunk.actions for chunk in world.chunks]).all()
        assert world.trigger("reset").success and world.trigger("start").success
        world.wait_moving()
        assert node.poll() is None and "Traceback" not in log.read_text()


def test_an_engine_that_never_gives_a_number_is_not_configured(world: World, tmp_path: Path) -> None:
    policy, engine, log = tiny_policy_folder(tmp_path / "policy"), tmp_path / "engine", tmp_path / "log"
    tensors = load_file(policy / "model.safetensors")
    tensors["language_model.lm_head.weight"].fill_(2e38)
    save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    assert engine_build(["build", "--policy", str(policy), "--uniform", "w16a16", "--out", str(engine)]) == 0
    with process(command(engine, tiny_contract(tmp_path / "contract.yaml")), world.domain, log):
        world.wait(lambda: "configure refused" in log.read_text(), "the refusal")
    assert "configure refused: logits of the action tokens: 256 of 256 values are not finite" in log.read_text()
