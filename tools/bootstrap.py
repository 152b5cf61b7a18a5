"""Makes the virtual environment .venv, installs everything into it at the locked versions, and builds ros2_ws.

    python3 tools/bootstrap.py [--venv .venv]

Runs on the system's Python 3.11 or later with nothing but the standard library. A second run does nothing.
"""

import argparse
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "dev,openvino,ray,ros,tensorrt"
# Type stubs whose metadata asks for the library itself, which its vendor alone distributes.
ALONE = ("tensorrt-stubs",)
_DISK_BYTES = 4 * 2**30
_LOCKS = ("pyproject.toml", "constraints.txt", "tools/bootstrap.py")


class BootstrapError(Exception):
    """Something that the user has to mend first; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when environment and workspace are ready, 2 with one line on stderr when they cannot be made."""
    parser = argparse.ArgumentParser(description="Create .venv, install the locked versions, build ros2_ws.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the virtual environment")
    arguments = parser.parse_args(argv)
    try:
        install(arguments.venv)
        return _child([_python(arguments.venv), "tools/build_workspace.py"])
    except BootstrapError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130


def install(venv: Path) -> None:
    """Brings `venv` to the locked versions. Raises BootstrapError where this machine cannot."""
    stamp = venv / ".installed"
    wanted = _signature()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    check_machine(venv.parent)
    started = time.monotonic()
    if _child([_python(venv), "-m", "pip", "--version"], quiet=True) != 0:
        print(f"creating {venv}", flush=True)
        if _child([sys.executable, "-m", "venv", "--clear", str(venv)]) != 0:
            raise BootstrapError(f"{venv}: cannot create a virtual environment; check free space and permissions")
    pip = [_python(venv), "-m", "pip", "install", "--disable-pip-version-check", "--constraint", "constraints.txt"]
    if not sys.stdout.isatty():
        pip.append("--quiet")
    print("installing the locked versions (minutes the first time)", flush=True)
    steps = (["pip", "setuptools", "wheel"], ["--editable", f".[{EXTRAS}]"], ["--no-deps", *ALONE])
    for packages in steps:
        if _child([*pip, *packages]) != 0:
            raise BootstrapError(
                f"pip could not install {packages[-1]} into {venv}; its reason stands above; "
                "check the network, the package index and free space, then run the same command again"
            )
    stamp.write_text(wanted, encoding="utf-8")
    print(f"installed in {time.monotonic() - started:.0f} s", flush=True)


def check_machine(folder: Path) -> None:
    """Raises BootstrapError naming what this machine lacks, before anything is downloaded."""
    if sys.version_info < (3, 11):  # noqa: UP036  (the one place that older interpreters reach)
        raise BootstrapError(
            f"Python {platform.python_version()} is too old; expected 3.11 or later; "
            "name a newer one: make PYTHON=python3.12 demo"
        )
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise BootstrapError(
            f"{sys.platform} {platform.machine()}: the ROS 2 wheels exist for linux x86_64 only; "
            "elsewhere install ROS 2 from the distribution and build ros2_ws with its colcon"
        )
    missing = [
        package
        for package, present in {
            "python3-venv": importlib.util.find_spec("ensurepip") is not None,
            "python3-dev": (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
            "build-essential": shutil.which("c++") is not None and shutil.which("make") is not None,
        }.items()
        if not present
    ]
    if missing:
        raise BootstrapError(
            f"missing {', '.join(missing)} (own ROS interfaces are compiled here); "
            f"install with: sudo apt-get install {' '.join(missing)}"
        )
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < _DISK_BYTES:
        raise BootstrapError(
            f"{folder}: {free_bytes / 2**30:.1f} GiB free; the installation needs {_DISK_BYTES / 2**30:.0f} GiB; "
            "free some space"
        )


def _python(venv: Path) -> str:
    return str(venv / "bin" / "python")


def _child(command: Sequence[str], quiet: bool = False) -> int:
    """Exit status of a command in the repository root; 127 where it does not exist."""
    # The ROS wheels guard their one re-execution with this variable; another environment's must not leak in.
    environment = {name: value for name, value in os.environ.items() if name != "_ROS_WHEELS_BOOTSTRAP_COMPLETE"}
    output = subprocess.DEVNULL if quiet else None
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False).returncode
    except FileNotFoundError:
        return 127


def _signature() -> str:
    digest = hashlib.sha256(f"{sys.version}\n{sys.executable}\n".encode())
    for name in _LOCKS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
