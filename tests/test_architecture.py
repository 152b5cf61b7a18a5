"""Dependencies point one way: evaluation -> engine_build -> calibrator -> vla_policy.core; the robot stays light.

What is found by its name, a policy family or a backend, is named nowhere else.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
# Each folder may import those behind it. The calibrator's follow its pipeline, the last step first.
FOLDERS = {
    "calibrator": (
        "commands",
        "report",
        "allocation",
        "sensitivity",
        "transforms",
        "data",
        "families",
        "modules",
        "quantizers",
    ),
    "engine_build": ("backends", "families", "graph"),
    "vla_policy.core": ("families", "prismatic", "backends"),
}
PRODUCT = ("vla_policy.core", "vla_policy.nodes", "calibrator", "engine_build", "evaluation")
# Modules of the published checkpoints by their names, and where their layout is known beside the families.
TENSOR_NAMES = re.compile(
    r"vision_backbone|featurizer|language_model|embed_tokens|self_attn|lm_head|action_head|proprio_projector"
)
_GRAPHS = [f"/engine_build/graph/{name}.py" for name in ("gemma", "llama", "siglip", "vision")]
LAYOUTS = ("/calibrator/modules/", *_GRAPHS, "/core/flow/", "/core/prismatic/")
# Whatever a robot has to install for the core; the other runtimes are imported where such an engine is loaded.
CORE_LIBRARIES = {
    *("numpy", "PIL", "tokenizers", "onnxruntime", "yaml", "rosbags", "lz4", "backports", "compression"),
    *("openvino", "tensorrt", "tensorrt_rtx", "pycuda"),
}
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


@pytest.mark.parametrize("package", FOLDERS)
def test_folders_import_one_way(package: str) -> None:
    folders = [f"{package}.{name}" for name in FOLDERS[package]]
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {folder} must not import {name}"
        for place, folder in enumerate(folders)
        for path in _sources(_folder(folder))
        for line, name in _imports(path)
        for before in folders[:place]
        if _is_in(name, before)
    ]
    assert all(_sources(_folder(folder)) for folder in folders) and not wrong, "\n".join(wrong)


def _place(path: Path) -> str:
    """The path from the repository's root, with a slash before it."""
    return f"/{path.relative_to(ROOT).as_posix()}"


def _names(registry: str) -> set[str]:
    """The folders of all packages' registries called "families" or "backends"."""
    folders = [_folder(package) / registry for package in ("vla_policy.core", "calibrator", "engine_build")]
    return {path.parent.name for folder in folders for path in folder.glob("*/__init__.py")}


def _words(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every name, attribute, import and string of a file; docstrings are for people."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
        for field in ("id", "attr", "name", "module", "arg"):
            if isinstance(text := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), text


def _said(pattern: re.Pattern[str], homes: Sequence[str]) -> list[str]:
    """Where the product's code outside `homes` (parts of paths) says what the pattern finds."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for package in PRODUCT
        for path in _sources(_folder(package))
        if not any(home in _place(path) for home in homes)
        for line, text in _words(path)
        if pattern.search(text)
    ]


def test_only_its_folders_say_a_family_s_name() -> None:
    names = _names("families")
    assert len(names) > 1
    homes = [f"/families/{name}/" for name in names]
    # As code writes them; prose may say OpenVLA. A command is named after the checkpoints that it reads.
    pattern = re.compile("|".join([*names, *map(str.upper, names)]))
    assert not (said := _said(pattern, [*homes, "/calibrator/__main__.py"])), said


def test_only_its_folders_and_the_targets_say_a_backend_s_name() -> None:
    names = _names("backends")
    homes = [*(f"/backends/{name}/" for name in names), "/core/targets.py", "/evaluation/results.py"]
    assert not (said := _said(re.compile(rf"^({'|'.join(names)})$"), homes)), said


@pytest.mark.parametrize("registry", ["families", "backends"])
def test_what_is_found_by_name_is_not_imported_by_name(registry: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {name}"
        for package in PRODUCT
        for path in _sources(_folder(package))
        for line, name in _imports(path)
        if (found := re.search(rf"\.{registry}\.({'|'.join(_names(registry))})(\.|$)", name))
        # The same family elsewhere; a backend may build on another.
        and not (f"/families/{found[1]}/" in _place(path) or "/backends/" in _place(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_families_and_shared_modules_know_the_layout_of_tensor_names() -> None:
    homes = [*(f"/families/{name}/" for name in _names("families")), *LAYOUTS]
    assert not (said := _said(TENSOR_NAMES, homes)), said


def test_nobody_asks_which_family_a_policy_is_of() -> None:
    """Only who looks a family up reads its name; types and settings of one family are asked for nowhere else."""
    homes = [f"/families/{name}/" for name in _names("families")]
    lookups = ["/core/policy_config.py", "/families/__init__.py", "/calibrator/families/base.py"]
    assert not (said := _said(re.compile("model_type"), [*homes, *lookups, "/core/prismatic/config.py"])), said
    own = re.compile(r"^(num_actions_chunk|use_proprio|state_in_prompt|PrismaticConfig|Prismatic)$")
    assert not (said := _said(own, [*homes, *LAYOUTS])), said


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


def test_no_random_generator_is_on_the_robot() -> None:
    """What a decision draws was drawn before: node, replay and process decide alike."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in _sources(ROBOT / "vla_policy")
        for line, text in [*_imports(path), *_words(path)]
        if re.fullmatch(r"random|secrets|(numpy\.)?random|default_rng|RandomState|urandom", text)
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
