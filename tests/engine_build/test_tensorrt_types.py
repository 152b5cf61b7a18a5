"""Every name, enum and call of TensorRT's interface that builder and runner use exists in TensorRT's own stubs.

The stubs do not parse as published, so a repaired copy is checked against. They also leave out what TensorRT converts
itself (tuples to `Dims`, engines to bytes), so types of arguments are not compared: names and numbers of arguments are.
"""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKED = (
    ROOT / "engine_build" / "backends" / "tensorrt" / "builder.py",
    ROOT / "ros2_ws" / "src" / "vla_policy" / "vla_policy" / "core" / "backends" / "tensorrt" / "session.py",
)
WRONG = """
import tensorrt as trt

def wrong(config: trt.IBuilderConfig, context: trt.IExecutionContext) -> None:
    config.create_timing_cash(b"")
    config.set_timing_cache()
    context.execute_async_v3(0, 1, 2)
    trt.ProfilingVerbosity.LOUD
"""


def repaired(line: str) -> str:
    """A line of a stub. Two kinds of signatures are no Python: a parameter called `in`, and one after a default."""
    if not line.lstrip().startswith("def "):
        return line
    try:
        ast.parse(f"{line.strip()} ...")
        return line
    except SyntaxError:
        return re.sub(r"(= None, \w+: \w+)\)", r"\1 = ...)", line.replace(" in:", " in_:"))


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with TensorRT's stubs that mypy can read."""
    try:
        files = importlib.metadata.files("tensorrt-stubs") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs TensorRT's type stubs: pip install --no-deps tensorrt-stubs")
    folder = tmp_path_factory.mktemp("stubs")
    for file in files:
        if file.suffix == ".pyi":
            (folder / file).parent.mkdir(exist_ok=True)
            text = "\n".join(repaired(line) for line in file.read_text().split("\n"))
            ast.parse(text)
            (folder / file).write_text(text)
    return folder


def test_the_interface_that_is_used_exists(stubs: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    files = [Path(shutil.copyfile(path, tmp_path / f"checked_{path.parents[1].name}_{path.name}")) for path in CHECKED]
    # Everything else is skipped, which makes it Any: following numpy and onnx takes four times as long.
    command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=skip", "--check-untyped-defs"]
    command += ["--ignore-missing-imports", "--disable-error-code=arg-type", "--disable-error-code=misc"]
    command += [f"--cache-dir={tmp_path / 'cache'}", str(tmp_path / "wrong.py"), *map(str, files)]
    command += map(str, sorted(stubs.rglob("*.pyi")))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"MYPYPATH": str(stubs)}, cwd=tmp_path
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    ours = [line for line in errors if line.startswith("checked_")]
    assert not ours, "\n".join(ours)
    noticed = [int(line.split(":")[1]) for line in errors if line.startswith("wrong.py")]
    assert noticed == [5, 6, 7, 8], done.stdout[-2000:] + done.stderr
