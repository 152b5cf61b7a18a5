"""The policy node as a process, fed over DDS, against the same engine in this process."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from calibrator.quantizers import parse_choice
from demo.decisions import ParityError, check_parity
from engine_build.build import Request, build
from tests.demo.materials import tiny_bag, tiny_contract
from tests.tiny import tiny_policy_folder
from vla_policy.core.bag import read_frames
from vla_policy.core.contract import load_contract
from vla_policy.core.observe import observe
from vla_policy.core.runner import load_engine
from vla_policy.core.synchroniser import Frame
from vla_policy.core.targets import find_target

pytest.importorskip("vla_policy_interfaces", reason="the ROS workspace is not sourced; run `make unit`")

ROOT = Path(__file__).resolve().parents[2]
TOPICS = ("/instruction", "/joint_states", "/camera/image_raw/compressed")


@dataclass(frozen=True)
class Setting:
    engine: Path
    bag: Path
    contract: Path

    def serve(self, out: Path, *options: str) -> "subprocess.CompletedProcess[str]":
        where = ["--engine", self.engine, "--bag", self.bag, "--contract", self.contract, "--out", out]
        return subprocess.run(
            [sys.executable, "-m", "demo.serving", *map(str, where), *options],
            cwd=ROOT,
            env=os.environ | {"ROS_DOMAIN_ID": str(60 + os.getpid() % 40)},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("serving")
    policy = tiny_policy_folder(folder / "policy")
    uniform = parse_choice("w4a16_g64")
    build(Request(policy=policy, target=find_target("cpu"), out=folder / "engine", uniform=uniform))
    return Setting(folder / "engine", tiny_bag(folder / "bag"), tiny_contract(folder / "contract.yaml"))


def _decisions(path: Path) -> list[tuple[int, list[int], list[float]]]:
    content: dict[str, Any] = json.loads(path.read_text())
    return [
        (item["stamp_ns"], item["tokens"], [float.fromhex(value) for value in item["actions_hex"]])
        for item in content["decisions"]
    ]


def test_served_actions_are_the_engines_own(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "served.json"
    done = setting.serve(out, "--rate", "4")
    assert done.returncode == 0, done.stderr
    contract, engine = load_contract(setting.contract), load_engine(setting.engine)
    expected = []
    for frame in read_frames(setting.bag, contract):
        assert isinstance(frame, Frame)
        decision = engine.act(observe(frame, contract))
        expected.append((frame.stamp_ns, decision.tokens.tolist(), decision.action.tolist()))
    assert len(expected) == 20 and len({str(action) for _, _, action in expected}) > 5
    assert _decisions(out) == expected
    parity = check_parity(out, setting.engine, setting.bag, contract)
    assert (parity.frames, parity.served, parity.equal) == (20, 20, 20)

    foreign = tmp_path / "foreign.json"
    publisher = [sys.executable, "tests/demo/publish_bag.py", str(setting.bag), "/demo", "4", *TOPICS]
    done = setting.serve(foreign, "--publisher", *publisher)
    assert done.returncode == 0, done.stderr
    assert _decisions(foreign) == expected

    content = json.loads(out.read_text())
    content["decisions"][7]["actions_hex"][1] = (1e-300).hex()
    out.write_text(json.dumps(content))
    with pytest.raises(ParityError, match="frame 1001800000000 ns: the node served tokens"):
        check_parity(out, setting.engine, setting.bag, contract)


def test_truncated_engine_is_refused_in_one_line(setting: Setting, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    for path in setting.engine.iterdir():
        content = path.read_bytes()
        (engine / path.name).write_bytes(content if path.name == "manifest.json" else content[:-5])
    out = tmp_path / "out" / "served.json"
    done = Setting(engine, setting.bag, setting.contract).serve(out)
    assert done.returncode == 2
    assert "error: policy node refused to configure:" in done.stderr and "truncated" in done.stderr
    assert not out.exists()


def test_publisher_that_fails_is_named(setting: Setting, tmp_path: Path) -> None:
    done = setting.serve(tmp_path / "served.json", "--publisher", sys.executable, "-c", "raise SystemExit('no tape')")
    assert done.returncode == 2
    assert "ended (1): no tape" in done.stderr.splitlines()[-1]
