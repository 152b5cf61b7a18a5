"""Launch files: run by launch where ROS is installed; everywhere, the command lines that launch generates from them."""

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.ros.world import CONTRACT, ROOT, World, fake_engine, fresh_domain, process
from vla_policy.nodes import parameters, replay_node

PACKAGE = ROOT / "ros2_ws/src/vla_policy"
LAUNCH_FILES = sorted([*(PACKAGE / "launch").glob("*.launch.py"), *(ROOT / "launch").glob("*.launch.py")])
CONVENTIONAL = {"namespace", "log_level"}


@pytest.fixture
def world() -> Iterator[World]:
    made = World(fresh_domain())
    yield made
    made.close()


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_launch_runs_the_file(path: Path) -> None:
    pytest.importorskip("launch_ros", reason="launch_ros is in no registry; it comes with a ROS installation")
    from launch.actions import DeclareLaunchArgument
    from launch.launch_description_sources import PythonLaunchDescriptionSource

    from launch import LaunchContext

    description = PythonLaunchDescriptionSource(str(path)).get_launch_description(LaunchContext())
    declared = {item.name for item in description.entities if isinstance(item, DeclareLaunchArgument)}
    assert declared >= CONVENTIONAL


def calls(path: Path, name: str) -> list[ast.Call]:
    tree = ast.parse(path.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node for node in found if isinstance(node.func, ast.Name) and node.func.id == name]


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_every_name_in_a_launch_file_exists(path: Path) -> None:
    """Arguments used are declared; included files, configuration, executables and parameters exist."""
    text = path.read_text()
    declared = {str(ast.literal_eval(call.args[0])) for call in calls(path, "DeclareLaunchArgument")}
    used = set(re.findall(r'LaunchConfiguration\("(\w+)"\)', text))
    assert declared >= used | CONVENTIONAL
    for name in re.findall(r'"([\w.]+\.(?:yaml|xml|launch\.py))"', text):
        assert (PACKAGE / "config" / name).is_file() or (PACKAGE / "launch" / name).is_file(), name
    for executable in re.findall(r'executable="(\w+)"', text):
        assert f"{executable} = vla_policy.nodes.{executable}:main" in (PACKAGE / "setup.py").read_text()
    known = {*parameters.DECLARED, *replay_node.DEFAULTS, "use_sim_time"}
    for call in calls(path, "Node"):
        values = next(keyword.value for keyword in call.keywords if keyword.arg == "parameters")
        names = [
            ast.literal_eval(key) for item in ast.walk(values) if isinstance(item, ast.Dict) for key in item.keys if key
        ]
        assert set(names) <= known


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


def test_the_command_line_that_launch_generates(world: World, tmp_path: Path) -> None:
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
    os.environ["FASTRTPS_DEFAULT_PROFILES_FILE"] = str(PACKAGE / "config/fastdds_large_images.xml")
    try:
        with process(command, world.domain, tmp_path / "log"):
            world.wait(lambda: world.node.count_subscribers("/instruction") > 0, "the active policy node")
            world.instruct()
            world.wait_chunks()
            assert ("left", "/arm") in world.node.get_node_names_and_namespaces()
    finally:
        del os.environ["FASTRTPS_DEFAULT_PROFILES_FILE"]
    assert "XMLPARSER Error" not in (tmp_path / "log").read_text()
