"""Dependencies point one way: evaluation -> engine_build -> calibrator -> vla_policy.core; the robot stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROBOT = ROOT / "ros2_ws" / "src" / "vla_policy"

OWN = ("vla_policy.core", "vla_policy.nodes", "calibrator", "engine_build", "evaluation", "demo")
ALLOWED = {
    "vla_policy.core": {"vla_policy.core"},
    "vla_policy.nodes": {"vla_policy.core", "vla_policy.nodes"},
    "calibrator": {"calibrator", "vla_policy.core"},
    "engine_build": {"engine_build", "calibrator", "vla_policy.core"},
    # The simulated robot is a node too, and says its commands and stops as the policy's node does.
    "evaluation": {"evaluation", "engine_build", "calibrator", "vla_policy.core", "vla_policy.nodes"},
    "demo": set(OWN) - {"vla_policy.nodes"},
}
# The calibrator's folders follow its pipeline; each may import those before it, and the shared `calibrator.tensors`.
CALIBRATOR = ("report", "allocation", "sensitivity", "data", "families", "quantizers")
# Whatever a robot has to install for the core; the GPU runtimes are imported where such an engine is loaded.
CORE_LIBRARIES = {"numpy", "PIL", "tokenizers", "onnxruntime", "yaml", "rosbags", "tensorrt", "tensorrt_rtx", "pycuda"}
WORKSTATION_LIBRARIES = {"torch", "transformers", "cvxpy", "onnx", "ray", "libero", "metaworld", "mujoco", "h5py"}


def _folder(package: str) -> Path:
    return (ROBOT if package.startswith("vla_policy") else ROOT) / package.replace(".", "/")


def _sources(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if not {"test", "build"} & set(path.relative_to(ROOT).parts)]


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import in the file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the absolute name"
            if node.module == "vla_policy":
                for alias in node.names:
                    yield node.lineno, f"vla_policy.{alias.name}"
            else:
                yield node.lineno, node.module or ""


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("package", OWN)
def test_imports_point_one_way(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {package} must not import {name}"
        for path in _sources(_folder(package))
        for line, name in _imports(path)
        for own in (*OWN, "tests")
        if _is_in(name, own) and own not in ALLOWED[package]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("place", range(len(CALIBRATOR)))
def test_the_calibrator_s_folders_import_one_way(place: int) -> None:
    folder = f"calibrator.{CALIBRATOR[place]}"
    sources = _sources(_folder(folder))
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {folder} must not import {name}"
        for path in sources
        for line, name in _imports(path)
        for later in CALIBRATOR[:place]
        if _is_in(name, f"calibrator.{later}")
    ]
    assert sources and not wrong, "\n".join(wrong)


def test_every_package_has_sources() -> None:
    assert [package for package in OWN if not _sources(_folder(package))] == []


def test_core_needs_only_what_a_robot_installs() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: the robot core must not import {name}"
        for path in _sources(_folder("vla_policy.core"))
        for line, name in _imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names | CORE_LIBRARIES | {"vla_policy"}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_robot_package_and_the_launch_files_import_nothing_of_the_workstation() -> None:
    forbidden = WORKSTATION_LIBRARIES | {"calibrator", "engine_build", "evaluation", "demo"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {name}"
        for folder in (ROBOT / "vla_policy", ROBOT / "launch", ROOT / "launch")
        for path in _sources(folder)
        for line, name in _imports(path)
        if name.split(".")[0] in forbidden
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_the_core_loads_neither_torch_nor_rclpy() -> None:
    modules = [".".join(path.relative_to(ROBOT).with_suffix("").parts) for path in _sources(_folder("vla_policy.core"))]
    program = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules!r}]; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'rclpy', 'transformers', 'onnx'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["calibrator", "engine_build", "evaluation"])
def test_help_is_quick_because_torch_is_not_loaded(command: str) -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['{command}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('{command}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as finished:\n"
        "    assert finished.code in (0, None), finished.code\n"
        "print('LOADED', 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("LOADED False"), done.stdout + done.stderr
