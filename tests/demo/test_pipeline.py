"""The whole chain on the tiny policy with a real node process, and what it says when something is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.stages import Stage
from tests.core.bags import write_bag
from tests.core.ros_messages import text
from tests.demo.materials import tiny_bag, tiny_contract
from tests.tiny import tiny_policy_folder

pytest.importorskip("vla_policy_interfaces", reason="the ROS workspace is not sourced; run `make unit`")

ROOT = Path(__file__).resolve().parents[2]
ARTEFACTS = ("calibration", "sensitivity.json", "plan.json", "engines/mixed", "served.json", "report.html")


@dataclass(frozen=True)
class Workplace:
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def command(self, *options: str) -> list[str]:
        names = {"policy": "policy", "bag": "bag", "contract": "contract.yaml", "out": "out"}
        defaults = {f"--{name}": str(self.folder / path) for name, path in names.items()}
        defaults |= {"--samples": "6", "--rate": "4", "--repeats": "3"}
        given = dict(zip(options[::2], options[1::2], strict=True))
        arguments = [item for pair in (defaults | given).items() for item in pair]
        return [sys.executable, "-m", "demo.pipeline", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"ROS_DOMAIN_ID": str(60 + os.getpid() % 40), "OMP_NUM_THREADS": "1"}

    def run(self, *options: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(*options), cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_policy_folder(folder / "policy")
    tiny_bag(folder / "bag")
    tiny_contract(folder / "contract.yaml")
    return Workplace(folder)


@pytest.fixture(scope="module")
def finished(place: Workplace) -> Iterator["tuple[Workplace, subprocess.CompletedProcess[str]]"]:
    yield place, place.run()


def _one_error(done: "subprocess.CompletedProcess[str]") -> str:
    """The error line; anything that looks like a traceback fails the test."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_first_run_makes_everything(finished: "tuple[Workplace, subprocess.CompletedProcess[str]]") -> None:
    place, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name for name in ARTEFACTS if not (place.out / name).exists()] == []
    plan = json.loads((place.out / "plan.json").read_text())
    assert plan["average_bits"] <= 4.0 and plan["gap"] < 1e-9 and plan["solver"] == "HIGHS"
    manifest = json.loads((place.out / "engines/mixed/manifest.json").read_text())
    assert 8 * manifest["totals"]["code_bytes"] == plan["weight_bits"]
    assert len({unit["realised"] for unit in manifest["units"]}) > 2
    parity = json.loads((place.out / "parity.json").read_text())
    assert (parity["frames"], parity["served"], parity["equal"]) == (20, 20, 20)
    page = (place.out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert "bytes of codes, as planned" in done.stdout and "scales add" in done.stdout


def test_second_run_does_nothing(finished: "tuple[Workplace, subprocess.CompletedProcess[str]]") -> None:
    place, _ = finished
    before = place.files()
    done = place.run()
    assert done.returncode == 0, done.stderr
    assert "0 stages ran" in done.stdout
    assert place.files() == before


def test_infeasible_budget_names_the_range_and_overwrites_nothing(
    finished: "tuple[Workplace, subprocess.CompletedProcess[str]]",
) -> None:
    place, _ = finished
    before = (place.out / "plan.json").read_bytes()
    line = _one_error(place.run("--average-bits", "1.5"))
    assert "average bits 1.5 is below the minimum 2" in line
    assert (place.out / "plan.json").read_bytes() == before


def test_truncated_artefact_is_refused(finished: "tuple[Workplace, subprocess.CompletedProcess[str]]") -> None:
    place, _ = finished
    path = place.out / "losses.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    try:
        line = _one_error(place.run())
        assert "losses.safetensors: changed or truncated since the stage 'sensitivity' made it" in line
        assert path.read_bytes() == whole[:100]
    finally:
        path.write_bytes(whole)


def test_plan_of_another_policy_is_refused(
    finished: "tuple[Workplace, subprocess.CompletedProcess[str]]", tmp_path: Path
) -> None:
    place, _ = finished
    other = tiny_policy_folder(tmp_path / "other", seed=1)
    command = ["build", "--policy", other, "--plan", place.out / "plan.json", "--out", tmp_path / "engine"]
    done = subprocess.run(
        [sys.executable, "-m", "engine_build", *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "policy" in _one_error(done)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("name", ["policy", "bag", "contract"])
def test_missing_input_is_named_before_any_work(place: Workplace, tmp_path: Path, name: str) -> None:
    missing, out = tmp_path / "nowhere", tmp_path / "out"
    line = _one_error(place.run(f"--{name}", str(missing), "--out", str(out)))
    assert str(missing) in line
    assert not out.exists()


def test_bag_without_the_topics_is_named_before_any_work(place: Workplace, tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", [("/chatter", "std_msgs/msg/String", 1, text("hello"))])
    line = _one_error(place.run("--bag", str(bag), "--out", str(tmp_path / "out")))
    assert "no topics /instruction, /joint_states" in line and "the bag holds /chatter" in line
    assert not (tmp_path / "out").exists()


def test_truncated_bag_is_one_line(place: Workplace, tmp_path: Path) -> None:
    bag = tmp_path / "bag"
    shutil.copytree(place.folder / "bag", bag)
    (path,) = bag.glob("*.mcap")
    path.write_bytes(path.read_bytes()[:-2000])
    assert str(bag) in _one_error(place.run("--bag", str(bag), "--out", str(tmp_path / "out")))


def test_interrupt_leaves_nothing_half_written_and_the_next_run_continues(place: Workplace, tmp_path: Path) -> None:
    other = Workplace(tmp_path)
    for name in ("policy", "bag"):
        shutil.copytree(place.folder / name, tmp_path / name)
    tiny_contract(tmp_path / "contract.yaml")
    process = subprocess.Popen(
        other.command(), cwd=ROOT, env=other.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[2/"):
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    left = [path.name for path in other.out.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".")]
    assert left == []
    assert (other.out / "calibration.stage.json").is_file() and not (other.out / "plan.json").exists()
    done = other.run()
    assert done.returncode == 0, done.stderr
    assert "calibration set from the bag: unchanged" in done.stdout


def test_disk_that_fills_up_is_one_line(place: Workplace, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        line = _one_error(place.run("--out", str(small / "out")))
        assert "No space left on device" in line and "check free space" in line
        assert [path.name for path in small.rglob("*") if path.is_file()] in ([], ["demo.json"])
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_workspace_that_is_not_sourced_is_named(place: Workplace) -> None:
    hidden = ("PYTHONPATH", "AMENT_PREFIX_PATH")
    environment = {name: value for name, value in place.environment.items() if name not in hidden}
    done = subprocess.run(place.command(), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "run `make demo`" in _one_error(done)


def test_every_stage_writes_only_into_the_output_folder(place: Workplace) -> None:
    from demo.pipeline import _parse, stages

    job = _parse(["--out", str(place.out)])
    chain: list[Stage] = stages(job)
    outputs = [path for stage in chain for path in stage.outputs]
    assert all(path.is_relative_to(place.out) for path in outputs)
    assert len(set(outputs)) == len(outputs)
