"""The robot core on Ubuntu 22.04 (ROS 2 Humble, JetPack 6): Python 3.10 with that distribution's NumPy and Pillow."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.core.ros_messages import png

ROOT = Path(__file__).parents[2]
# NumPy and Pillow as Ubuntu 22.04 has them; the others as pip gives them there.
DISTRIBUTION = ["numpy==1.21.5", "pillow==9.0.1"]
OTHERS = ["backports.zstd", "hypothesis", "lz4", "onnxruntime", "pytest", "pyyaml", "rosbags", "tokenizers"]
TESTS = ["actions", "chunks", "contract", "files", "image", "observe", "safety"]
SEEN = """
import hashlib, sys
from vla_policy.core.image import centre_crop, resize
from vla_policy.core.ros_image import CompressedImage
picture = CompressedImage("png", memoryview(bytes.fromhex(sys.argv[1]))).decode()
for image in (picture, resize(picture, 56), centre_crop(picture)):
    print(hashlib.sha256(image.tobytes()).hexdigest())
"""
IMPORT_ALL = """
import importlib, pkgutil, vla_policy.core
for module in pkgutil.walk_packages(vla_policy.core.__path__, "vla_policy.core."):
    importlib.import_module(module.name)
"""


def interpreter() -> str:
    pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob("3.10.*/bin/python"))
    for candidate in [*map(str, pyenv), shutil.which("python3.10")]:
        if candidate and subprocess.run([candidate, "-c", "import ensurepip"], capture_output=True).returncode == 0:
            return candidate
    pytest.skip("no Python 3.10 with venv on this machine")


@pytest.fixture(scope="module")
def python() -> str:
    """An environment of that distribution's versions, kept for the next run."""
    folder = ROOT / ".build/python310"
    made, packages = folder / "made", repr([*DISTRIBUTION, *OTHERS])
    if not made.exists() or made.read_text() != packages:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([interpreter(), "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # Last and alone: a package that asks for a newer NumPy must not replace the distribution's.
        for wanted in (OTHERS, ["--no-deps", "--force-reinstall", *DISTRIBUTION]):
            done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"pip cannot install Ubuntu 22.04's versions here: {done.stderr.strip()[-200:]}")
        made.write_text(packages)
    return str(folder / "bin/python")


def run(python: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'ros2_ws/src/vla_policy'}"}
    environment.pop("_ROS_WHEELS_BOOTSTRAP_COMPLETE", None)
    done = subprocess.run([python, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_every_module_of_the_core_is_imported(python: str) -> None:
    versions = run(python, "-c", f"{IMPORT_ALL}\nimport numpy, PIL, sys\nprint(sys.version_info[:2], PIL.__version__)")
    assert versions.strip() == "(3, 10) 9.0.1"


def test_the_policy_sees_the_same_pixels(python: str) -> None:
    """Decoded, resized and cropped by that Pillow and by this one."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    arguments = ["-c", SEEN, png(noise).hex()]
    assert run(python, *arguments) == run(sys.executable, *arguments)


def test_the_core_s_tests_pass(python: str) -> None:
    files = [f"tests/core/test_{name}.py" for name in TESTS]
    run(python, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", *files)
