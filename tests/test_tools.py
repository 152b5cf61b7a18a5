import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest

from tools import bootstrap, build_workspace

ROOT = Path(__file__).resolve().parents[1]


def test_old_interpreter_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.4")
    with pytest.raises(bootstrap.BootstrapError, match=r"Python 3\.10\.4 is too old; expected 3\.11 .* make PYTHON="):
        bootstrap.check_machine(tmp_path)


def test_other_architecture_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(bootstrap.BootstrapError, match="linux aarch64: the ROS 2 wheels exist for linux x86_64 only"):
        bootstrap.check_machine(tmp_path)


def test_missing_compiler_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(bootstrap.BootstrapError, match=r"missing build-essential .* apt-get install build-essential"):
        bootstrap.check_machine(tmp_path)


def test_full_disk_is_refused_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    with pytest.raises(bootstrap.BootstrapError, match=r"1\.0 GiB free; the installation needs 4 GiB"):
        bootstrap.check_machine(tmp_path)


def test_finished_installation_is_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bootstrap, "_signature", lambda: "these locks")
    monkeypatch.setattr(bootstrap, "check_machine", lambda folder: pytest.fail("looked at the machine again"))
    (tmp_path / ".installed").write_text("these locks")
    bootstrap.install(tmp_path)


def test_wheels_point_at_this_interpreter_after_the_rewrite(tmp_path: Path) -> None:
    export = tmp_path / "share" / "some_msgs" / "cmake" / "some_msgsExport.cmake"
    export.parent.mkdir(parents=True)
    export.write_text(
        'set(X\n  INTERFACE_INCLUDE_DIRECTORIES "/opt/build/include/python3.12;/opt/build/numpy/_core/include"\n)\n'
    )
    assert build_workspace.rewrite_include_directories(tmp_path) == 1
    include = sysconfig.get_paths()["include"]
    assert f'"{include};{numpy.get_include()}"' in export.read_text()
    assert build_workspace.rewrite_include_directories(tmp_path) == 0


def test_a_build_does_not_stumble_over_files_that_are_gone_or_packages_that_were_moved(tmp_path: Path) -> None:
    for name in ("moved", "kept"):
        (tmp_path / "build" / name).mkdir(parents=True)
        (tmp_path / "build" / name / "CMakeCache.txt").write_text(
            f"A:STRING=1\nCMAKE_HOME_DIRECTORY:INTERNAL={tmp_path / 'source' / name}\n"
        )
    (tmp_path / "source" / "kept").mkdir(parents=True)
    (tmp_path / "source" / "kept" / "package.xml").touch()
    (tmp_path / "install").mkdir()
    dead, alive = tmp_path / "install" / "dead.launch.py", tmp_path / "install" / "package.xml"
    dead.symlink_to(tmp_path / "source" / "dead.launch.py")
    alive.symlink_to(tmp_path / "source" / "kept" / "package.xml")
    build_workspace.remove_stale(tmp_path / "build", tmp_path / "install")
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == ["kept"]
    assert alive.exists() and not dead.is_symlink()


def test_a_workspace_that_holds_this_repository_builds_its_packages_and_no_others() -> None:
    """Above all none of the tests' own: a part of control_msgs would hide the real one from the whole workspace."""
    found = set()
    for folder, below, files in os.walk(ROOT):
        if "COLCON_IGNORE" in files:
            below.clear()
        elif "package.xml" in files:
            found.add(Path(folder).relative_to(ROOT).as_posix())
        below[:] = [name for name in below if not name.startswith(".")]  # colcon passes hidden folders by, too
    assert found == {"launch", "ros2_ws/src/vla_policy", "ros2_ws/src/vla_policy_interfaces"}


def test_with_ros_says_what_to_run_first(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "tools" / "with_ros", "true"],
        env={"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "run: make build" in done.stderr
