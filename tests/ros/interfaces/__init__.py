"""Interface packages of ROS that are in no registry: the parts that the tests need, built where they are missing."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@contextmanager
def installed(package: str, folder: Path) -> Iterator[None]:
    """Processes started within find `package`: the installed one, or what this folder has of it, built in `folder`."""
    if importlib.util.find_spec(package) is not None:
        yield
        return
    prefix = Path(sys.prefix)
    environment = os.environ | {"AMENT_PREFIX_PATH": str(prefix), "CMAKE_PREFIX_PATH": str(prefix)}
    for command in (
        ["cmake", "-S", HERE / package, "-B", folder / "build", f"-DCMAKE_INSTALL_PREFIX={folder / 'install'}"]
        + [f"-DPython3_EXECUTABLE={sys.executable}", "-DBUILD_TESTING=OFF"],
        ["cmake", "--build", folder / "build", "--target", "install"],
    ):
        built = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (packages,) = (folder / "install").glob("lib/python*/site-packages")
    added = {
        "PYTHONPATH": packages,
        "LD_LIBRARY_PATH": folder / "install/lib",
        "AMENT_PREFIX_PATH": folder / "install",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, path in added.items():
            patch.setenv(name, str(path), prepend=os.pathsep)
        yield
