"""Launch files: run by launch where ROS is installed; everywhere, the command lines that launch generates from them."""

import ast
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from engine_build.__main__ import main as engine_build
from tests.demo.materials import tiny_bag, tiny_contract
from tests.pi05_policy import tiny_pi05_folder
from tests.ros.world import CONTRACT, ROOT, World, end, fake_engine, fresh_domain, process
from tests.tiny import tiny_policy_folder
from vla_policy.core.bag import read_frames
from vla_policy.core.contract import load_contract
from vla_policy.core.observe import observe
from vla_policy.core.runner import load_engine
from vla_policy.core.served import read_served
from vla_policy.core.synchroniser import Frame
from vla_policy.nodes import parameters, replay_node

from rcl_interfaces.srv import GetParameters  # isort: skip  # after the importorskip in tests.ros.world

PACKAGE = ROOT / "ros2_ws/src/vla_policy"
LAUNCHING = PACKAGE / "vla_policy/launching.py"
LAUNCH_FILES = {
    path.name.removesuffix(".launch.py"): path
    for path in sorted([*(PACKAGE / "launch").glob("*.launch.py"), *(ROOT / "launch").glob("*.launch.py")])
}
COMMON = {"contract", "namespace", "log_level"}
POLICY = COMMON | {"params_file", "use_sim_time", "engine_path", "enabled", "check_sources", "lossless"}
REPLAY = COMMON | {"bag", "rate", "served", "summary", "publish_clock", "bag_namespace"}
ARGUMENTS = {
    "policy": POLICY,
    "replay": REPLAY,
    "replay_policy": POLICY | REPLAY,
    "sim_policy": POLICY | {"suite", "tasks", "trials", "lockstep"},
}
NO_LAUNCH = "launch_ros is in no registry; it comes with a ROS installation"


# --- with a ROS installation: the real launch --------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_launch_reads_the_file_and_lists_its_arguments(name: str) -> None:
    """Those of the included files too."""
    pytest.importorskip("launch_ros", reason=NO_LAUNCH)
    from launch.launch_description_sources import PythonLaunchDescriptionSource

    from launch import LaunchContext

    source = PythonLaunchDescriptionSource(str(LAUNCH_FILES[name]))
    description = source.get_launch_description(LaunchContext())
    assert {argument.name for argument in description.get_launch_arguments()} >= ARGUMENTS[name]


@pytest.fixture
def ros2() -> list[str]:
    pytest.importorskip("launch_ros", reason=NO_LAUNCH)
    command = shutil.which("ros2")
    if command is None:
        pytest.skip("ros2 is not on PATH; it comes with a ROS installation")
    return [command, "launch"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built engines `engine` of an OpenVLA policy and `pi05`, their `contract.yaml`, and a `bag` of
    20 images."""
    folder = tmp_path_factory.mktemp("launch")
    for name, write in (("engine", tiny_policy_folder), ("pi05", tiny_pi05_folder)):
        build = ["build", "--policy", str(write(folder / f"{name}_policy")), "--uniform", "w8a16_g32"]
        assert engine_build([*build, "--out", str(folder / name)]) == 0
    tiny_contract(folder / "contract.yaml")
    tiny_bag(folder / "bag")
    return folder


@pytest.mark.parametrize("engine", ["engine", "pi05"])
def test_launch_replays_a_bag_through_the_node(engine: str, ros2: list[str], material: Path, tmp_path: Path) -> None:
    """In a namespace, with a parameter file: the served decisions are those of the engine in process."""
    settings = tmp_path / "params.yaml"
    settings.write_text(
        yaml.safe_dump(
            {"/**": {"ros__parameters": {"autostart": True, "engine_threads": 1, "inference_deadline": 30.0}}}
        )
    )
    command = [*ros2, "vla_deploy", "replay_policy.launch.py", f"bag:={material / 'bag'}", "rate:=0.0"]
    command += [f"engine_path:={material / engine}", f"contract:={material / 'contract.yaml'}", "namespace:=arm"]
    command += [f"params_file:={settings}", "log_level:=warn", f"served:={tmp_path / 'served'}"]
    log = tmp_path / "log"
    with process(command, fresh_domain(), log) as launched:
        assert launched.wait(120) == 0, log.read_text()
    contract, own = load_contract(material / "contract.yaml"), load_engine(material / engine, threads=1)
    served = {action.stamp_ns: action.actions.tolist() for action in read_served(tmp_path / "served")}
    frames = [frame for frame in read_frames(material / "bag", contract) if isinstance(frame, Frame)]
    expected = {frame.stamp_ns: own.act(observe(frame, contract)).action for frame in frames}
    assert len(served) == 20
    assert served == {stamp_ns: np.atleast_2d(action).tolist() for stamp_ns, action in expected.items()}


def test_launch_arguments_win_over_the_file_only_where_given(
    ros2: list[str], world: World, material: Path, tmp_path: Path
) -> None:
    """And one interrupt ends launch and node in order."""
    settings = tmp_path / "params.yaml"
    written = {"engine_path": str(material / "engine"), "contract": "/nowhere.yaml", "autostart": True}
    written |= {"check_sources": "none", "lossless": True, "enabled": True, "inference_deadline": 30.0}
    settings.write_text(yaml.safe_dump({"/**": {"ros__parameters": written}}))
    command = [*ros2, "vla_policy", "policy.launch.py", f"params_file:={settings}", "node_name:=policy"]
    command += [f"contract:={material / 'contract.yaml'}", "enabled:=false"]
    wanted = {"contract": str(material / "contract.yaml"), "enabled": False, "lossless": True, "check_sources": "none"}
    log = tmp_path / "log"
    with process(command, world.domain, log) as launched:
        world.wait(lambda: "active, disabled: dry run" in log.read_text(), "the active node", 60)
        request = GetParameters.Request(names=list(wanted))
        values = world.call(GetParameters, "/policy/get_parameters", request).values
        found = {
            name: value.bool_value if value.type == 1 else value.string_value
            for name, value in zip(wanted, values, strict=True)
        }
        assert found == wanted
        assert end(launched, signal.SIGINT) == 0, log.read_text()
    assert "process has finished cleanly" in log.read_text() and "Traceback" not in log.read_text()


# --- everywhere: what launch would find and start ---------------------------------------------------------------


def calls(path: Path, name: str) -> list[ast.Call]:
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [node for node in found if isinstance(node.func, ast.Name) and node.func.id == name]


def table(path: Path) -> set[str]:
    """The names in a file's table of parameters; those of a launch file become launch arguments of the same names."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            return {str(ast.literal_eval(key)) for key in node.value.keys if key}
    return set()


def declared(path: Path) -> set[str]:
    """Launch arguments of a file and of those that it includes."""
    literal = [call.args[0] for call in calls(path, "DeclareLaunchArgument") if isinstance(call.args[0], ast.Constant)]
    included = re.findall(r'"(\w+)\.launch\.py"', path.read_text())
    own = {str(name.value) for name in literal} | table(path)
    own |= declared(LAUNCHING) if calls(path, "common_arguments") else set()
    return own.union(*(declared(LAUNCH_FILES[name]) for name in included))


@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_every_name_in_a_launch_file_exists(name: str) -> None:
    """Arguments used are declared; included files, configuration, executables and parameters exist."""
    path = LAUNCH_FILES[name]
    text = path.read_text()
    assert declared(path) >= ARGUMENTS[name] | set(re.findall(r'LaunchConfiguration\("(\w+)"\)', text))
    for file in re.findall(r'"([\w.]+\.(?:yaml|xml|launch\.py))"', text):
        assert (PACKAGE / "config" / file).is_file() or (PACKAGE / "launch" / file).is_file(), file
    for executable in re.findall(r'executable="(\w+)"', text):
        assert f"{executable} = vla_policy.nodes.start:{executable}" in (PACKAGE / "setup.py").read_text()
    robot = table(ROOT / "evaluation/robot/node.py")
    known = {"replay": {*replay_node.DECLARED}, "sim_policy": robot}
    assert table(path) <= known.get(name, {*parameters.DECLARED, "use_sim_time"})


@pytest.mark.parametrize("name", ["policy.params.yaml", "simulation.params.yaml"])
def test_shipped_parameters_are_the_node_s_own(name: str) -> None:
    values = yaml.safe_load((PACKAGE / "config" / name).read_text())["/**"]["ros__parameters"]
    flat = {
        f"{key}.{inner}" if inner else key
        for key, value in values.items()
        for inner in (value if isinstance(value, dict) else [""])
    }
    assert flat <= set(parameters.DECLARED)
    if name == "policy.params.yaml":
        assert flat == set(parameters.DECLARED), "the shipped file is the whole list"


def test_the_command_line_that_launch_generates(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node name, namespace, params file, later values that win, a remap, and the image transport's profile."""
    values = {"engine_path": str(fake_engine(tmp_path / "engine")), "contract": str(CONTRACT)}
    overrides = tmp_path / "overrides.yaml"
    overrides.write_text(yaml.safe_dump({"/**": {"ros__parameters": values}}))
    command = [
        sys.executable,
        str(ROOT / "tests/ros/fake_policy_node.py"),
        *("--ros-args", "-r", "__node:=left", "-r", "__ns:=/arm"),
        *("--params-file", str(PACKAGE / "config/policy.params.yaml"), "--params-file", str(overrides)),
        *("-r", "camera/image_raw/compressed:=/camera/image_raw/compressed", "-r", "joint_states:=/joint_states"),
        *("-r", "instruction:=/instruction", "-r", "action_chunk:=/action_chunk", "--log-level", "info"),
    ]
    monkeypatch.setenv("FASTRTPS_DEFAULT_PROFILES_FILE", str(PACKAGE / "config/fastdds_large_images.xml"))
    with process(command, world.domain, tmp_path / "log"):
        world.wait(lambda: world.node.count_subscribers("/instruction") > 0, "the active policy node")
        world.instruct()
        world.wait_chunks()
        assert ("left", "/arm") in world.node.get_node_names_and_namespaces()
    assert "XMLPARSER Error" not in (tmp_path / "log").read_text()
