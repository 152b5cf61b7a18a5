"""Every command that writes refuses, before it looks at its inputs, to write over what is not its own."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from calibrator.__main__ import main as calibrator
from engine_build.__main__ import main as engine_build
from evaluation.__main__ import main as evaluation
from vla_policy.core import cli

ROOT = Path(__file__).resolve().parents[1]
Main = Callable[[Sequence[str] | None], int]


def benchmark(name: str) -> Main:
    """A script's `main`; the scripts are no package."""

    def run(argv: Sequence[str] | None) -> int:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        status: int = module.main(argv)
        return status

    return run


def training(argv: Sequence[str] | None) -> int:
    from demo.train import main

    return main(list(argv or ()))


def session(argv: Sequence[str] | None) -> int:
    pytest.importorskip("rclpy", reason="the ROS workspace is not sourced; run `make unit`")
    from evaluation.robot.session import main

    return main(argv)


def serving(argv: Sequence[str] | None) -> int:
    pytest.importorskip("vla_policy_interfaces", reason="the ROS workspace is not sourced; run `make unit`")
    contract = ROOT / "ros2_ws/src/vla_policy/config/libero.yaml"
    from demo.serving import main

    return main([*(argv or ()), "--contract", str(contract)])


def pipeline(argv: Sequence[str] | None) -> int:
    pytest.importorskip("vla_policy_interfaces", reason="the ROS workspace is not sourced; run `make unit`")
    from demo.pipeline import main

    return main(argv)


FOLDERS: dict[str, tuple[Main, str]] = {
    "collect": (calibrator, "collect none --out OUT"),
    "transform": (calibrator, "transform --policy none --calibration none --out OUT"),
    "import-oft": (calibrator, "import-oft --checkpoint none --chunk 8 --images 2 --normalization bounds --out OUT"),
    "build": (engine_build, "build --policy none --uniform w16a16 --out OUT"),
    "replay": (evaluation, "replay --bag none --contract none --engine none --out OUT"),
    "table": (evaluation, f"table --config {ROOT}/demo/evaluation.yaml --out OUT"),
    "pipeline": (pipeline, "--out OUT"),
    "session": (session, "--expert --bag OUT --replace"),
    "train": (training, "--data none --key k --steps-per-action 1 --out OUT"),
    "benchmark": (benchmark("engine"), "--beside-16-bit --out OUT"),
}
FILES: dict[str, tuple[Main, str]] = {
    "sensitivity": (calibrator, "sensitivity --policy none --calibration none --no-resume --out OUT"),
    "losses": (calibrator, "sensitivity --policy none --calibration none --out FOLDER/sensitivity.json"),
    "allocate": (calibrator, "allocate --sensitivity none --average-bits 4 --out OUT"),
    "channels": (calibrator, "channels measure --policy none --calibration none --no-resume --out OUT"),
    "plan of channels": (calibrator, "channels allocate --channels none --average-bits 4 --out OUT"),
    "frontier": (calibrator, "allocate --sensitivity none --average-bits 4 --out FOLDER/plan.json --frontier OUT"),
    "report": (calibrator, "report --sensitivity none --out OUT"),
    "bench": (engine_build, "bench none --against none2 --out OUT"),
    "cost-table": (engine_build, "bench none --against none2 --cost-table OUT"),
    "rollout": (evaluation, "rollout --policy none --benchmark metaworld --out OUT"),
    "summary": (session, "--expert --summary OUT"),
    "served": (serving, "--engine none --bag none --out OUT"),
    "kernels": (benchmark("kernels"), "--out OUT"),
    "sweeps": (benchmark("sensitivity"), "--policy none --calibration none --out OUT"),
    "scale": (benchmark("openvla_scale"), "--out OUT"),
}


def refused(main: Main, command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends, with exit code 2."""
    assert cli.run(lambda: main(command.split())) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def content(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_thesis_is_not_replaced(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, command = FOLDERS[name]
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    before = content(tmp_path)
    line = refused(main, command.replace("OUT", str(thesis)), capsys)
    assert f"{thesis}: holds thesis.tex" in line and "name an absent or empty folder" in line
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_somebody_else_is_not_replaced(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, command = FILES[name]
    foreign = tmp_path / ("losses.safetensors" if name == "losses" else "foreign.json")
    foreign.write_text('{"kind": "diary"}')
    before = content(tmp_path)
    line = refused(main, command.replace("OUT", str(foreign)).replace("FOLDER", str(tmp_path)), capsys)
    assert f"{foreign}: exists and does not say that it is of kind" in line
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", [name for name in FILES if name != "losses"])
def test_a_folder_in_a_file_s_place_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, command = FILES[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    line = refused(main, command.replace("OUT", str(folder)).replace("FOLDER", str(tmp_path)), capsys)
    assert f"{folder}: is a folder; name a file" in line
