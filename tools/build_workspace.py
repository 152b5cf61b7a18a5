"""Builds the ROS 2 workspace with colcon against the ROS wheels of the virtual environment that runs this script.

    python tools/build_workspace.py [--force]

Does nothing when the sources, the installed ROS packages and the interpreter are those of the last build.
"""

import argparse
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parents[1]
STAMP = ROOT / "ros2_ws" / "install" / ".built"
_SOURCES = ("colcon_defaults.yaml", "launch", "ros2_ws/src")
_PYTHON_INCLUDE = re.compile(r"[^\s\";]*/include/python3\.\d+")
_CACHED_SOURCE = re.compile(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", re.MULTILINE)
_NUMPY_INCLUDE = re.compile(r"[^\s\";]*/numpy/_?core/include")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the workspace is built, 2 with one line on stderr when it cannot be."""
    parser = argparse.ArgumentParser(description="Build ros2_ws with colcon; does nothing when nothing changed.")
    parser.add_argument("--force", action="store_true", help="build even when nothing changed")
    arguments = parser.parse_args(argv)
    prefix = Path(sys.prefix)
    colcon = prefix / "bin" / "colcon"
    if not colcon.is_file():
        print(f"error: {colcon}: not found; install the 'ros' extra: pip install -e '.[ros]'", file=sys.stderr)
        return 2
    wanted = _signature()
    if not arguments.force and STAMP.is_file() and STAMP.read_text(encoding="utf-8") == wanted:
        return 0
    STAMP.unlink(missing_ok=True)
    rewrite_include_directories(prefix)
    remove_stale(ROOT / "ros2_ws" / "build", ROOT / "ros2_ws" / "install")
    command = [str(colcon), "--log-base", "ros2_ws/log", "build", "--symlink-install"]
    built = subprocess.run(
        [*command, "--cmake-args", "-DBUILD_TESTING=OFF", f"-DPython3_EXECUTABLE={sys.executable}"],
        cwd=ROOT,
        env=_build_environment(prefix),
        check=False,
    )
    if built.returncode != 0:
        print("error: colcon build failed; the log is in ros2_ws/log/latest_build", file=sys.stderr)
        return 2
    STAMP.write_text(wanted, encoding="utf-8")
    return 0


def rewrite_include_directories(prefix: Path) -> int:
    """Points the wheels' CMake exports at this environment's Python and NumPy headers.

    As shipped they name folders of the machine that built the wheels. Returns the number of files changed.
    """
    python_include = sysconfig.get_paths()["include"]
    numpy_include = numpy.get_include()
    changed = 0
    for path in sorted((prefix / "share").glob("*/cmake/*.cmake")):
        text = path.read_text(encoding="utf-8")
        rewritten = _PYTHON_INCLUDE.sub(lambda _: python_include, text)
        rewritten = _NUMPY_INCLUDE.sub(lambda _: numpy_include, rewritten)
        if rewritten != text:
            path.write_text(rewritten, encoding="utf-8")
            changed += 1
    return changed


def remove_stale(build: Path, install: Path) -> None:
    """Removes what the next build would stumble over: of a package that was moved, and links to a file that is gone."""
    for cache in build.glob("*/CMakeCache.txt"):
        source = _CACHED_SOURCE.search(cache.read_text(encoding="utf-8"))
        if source is not None and not (Path(source[1]) / "package.xml").is_file():
            shutil.rmtree(cache.parent)
    for path in (*build.rglob("*"), *install.rglob("*")):
        if path.is_symlink() and not path.exists():
            path.unlink()


def _build_environment(prefix: Path) -> dict[str, str]:
    """The caller's environment with the virtual environment as the only underlay."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("AMENT_PREFIX_PATH", "CMAKE_PREFIX_PATH", "COLCON_PREFIX_PATH", "PYTHONPATH")
    }
    return inherited | {
        "AMENT_PREFIX_PATH": str(prefix),
        "CMAKE_PREFIX_PATH": str(prefix),
        "PATH": f"{prefix / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def _signature() -> str:
    """Hex sha256 of everything that the build depends on."""
    digest = hashlib.sha256(f"{sys.executable}\n{sys.version}\n".encode())
    versions = sorted(
        f"{distribution.name}=={distribution.version}"
        for distribution in importlib.metadata.distributions()
        if distribution.name.startswith(("ros-", "colcon-", "setuptools"))
    )
    digest.update("\n".join(versions).encode())
    for path in _source_files():
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _source_files() -> Iterator[Path]:
    for name in (*_SOURCES, "tools/build_workspace.py"):
        path = ROOT / name
        if path.is_file():
            yield path
        for child in sorted(path.rglob("*")):
            if child.is_file() and "__pycache__" not in child.parts and ".egg-info" not in child.as_posix():
                yield child


if __name__ == "__main__":
    sys.exit(main())
