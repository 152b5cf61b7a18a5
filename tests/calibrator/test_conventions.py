"""Planted mistakes are found on the demo's policy and its demonstrations; what was right is left alone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_policy_folder

from calibrator.__main__ import main
from calibrator.conventions.check import AS_RECORDED, GRIPPER, VIEWS, Outcome, check
from calibrator.conventions.deciders import PolicyDecider
from calibrator.conventions.fit import Fit, clearly_better
from calibrator.data.bag import BagSource
from calibrator.data.calibration import CalibrationSet, collect, load_calibration
from calibrator.data.episodes import EpisodeSource
from calibrator.data.layout import RecordLayout
from calibrator.data.records import Record
from calibrator.families import Policy, load_policy
from calibrator.quantizers import parse_choice
from engine_build.build import Request, build
from tests.fake_source import FakeSource
from vla_policy.core.contract import load_contract
from vla_policy.core.errors import DataError
from vla_policy.core.targets import find_target

ROOT = Path(__file__).parents[2]
POLICY = ROOT / "demo/policies/libero_object"
CONTRACT = ROOT / "ros2_ws/src/vla_policy/config/libero.yaml"
STATES = 16
Change = Callable[[Record], Record]


class Planted(EpisodeSource):
    """The demo's demonstrations with a mistake."""

    def __init__(self, path: Path, change: Change) -> None:
        super().__init__(path, RecordLayout())
        self._change = change

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[Record]:
        yield from map(self._change, super().read(wanted))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(POLICY)


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("episodes")
    for path in sorted((ROOT / "demo/episodes/libero_object").glob("*.safetensors"))[::4]:
        shutil.copy(path, folder)
    return folder


def states(episodes: Path, out: Path, change: Change = lambda record: record) -> CalibrationSet:
    collect([Planted(episodes, change)], out, STATES, seed=0)
    return load_calibration(out)


def image(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def changed(record: Record) -> Record:
        seen = record.observation
        return replace(record, observation=replace(seen, image=np.ascontiguousarray(change(seen.image))))

    return changed


def action(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def changed(record: Record) -> Record:
        assert record.action is not None
        return replace(record, action=change(record.action))

    return changed


def other_state(record: Record) -> Record:
    assert record.observation.state is not None
    return replace(record, observation=replace(record.observation, state=record.observation.state[[1, 0, 2, 3, 4]]))


def test_what_is_right_fits_and_no_other_convention_does(policy: Policy, episodes: Path, tmp_path: Path) -> None:
    outcome = check(PolicyDecider(policy, POLICY), states(episodes, tmp_path / "set"), None)
    assert outcome.best is None and outcome.trials[0].name == AS_RECORDED
    assert outcome.trials[0].correlation > 0.9 and outcome.trials[0].agreement == 1
    assert [one["gripper"] for one in outcome.dimensions] == [False] * 6 + [True]
    assert [bool(one["spread"]) for one in outcome.dimensions] == [True] * 3 + [False] * 4
    assert {one.name for one in outcome.trials} >= {*VIEWS, GRIPPER}
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome
    assert "no other convention fits better" in outcome.summary


MISTAKES: dict[str, tuple[Change, str]] = {
    "turned": (image(lambda pixels: pixels[::-1, ::-1]), "images turned by 180 degrees"),
    "mirrored": (image(lambda pixels: pixels[:, ::-1]), "images mirrored"),
    "upside down": (image(lambda pixels: pixels[::-1]), "images upside down"),
    "colours": (image(lambda pixels: pixels[..., ::-1]), "red and blue exchanged"),
    "order": (action(lambda values: values[[1, 2, 0, 3, 4, 5, 6]]), "action values in another order"),
    "sign": (action(lambda values: values * np.float32([1, 1, -1, 1, 1, 1, 1])), "action values with other signs"),
    "gripper": (action(lambda values: values * np.float32([1, 1, 1, 1, 1, 1, -1])), GRIPPER),
    "state": (other_state, "state values in another order"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_planted_mistake_is_found_and_refused(policy: Policy, episodes: Path, tmp_path: Path, name: str) -> None:
    change, convention = MISTAKES[name]
    outcome = check(PolicyDecider(policy, POLICY), states(episodes, tmp_path / "set", change), None)
    assert outcome.best is not None and outcome.best.name == convention
    with pytest.raises(DataError, match=f"conventions: {convention} fits clearly better .* or go on with --flag"):
        outcome.require(False, "--flag")
    accepted = outcome.require(True, "--flag")
    assert accepted.accepted and accepted.summary.endswith("kept as they are on request")


def test_the_wrong_statistics_are_found(policy: Policy, episodes: Path, tmp_path: Path) -> None:
    """The other data set's robot was commanded three times as far, in other directions."""
    folder = Path(shutil.copytree(POLICY, tmp_path / "policy"))
    raw = json.loads((folder / "config.json").read_text())
    right = raw["norm_stats"]["libero_object"]
    low, high = [-4.0, 0.0, -4.0, 0, 0, 0, -1], [0.0, 4.0, 0.0, 0, 0, 0, 1]
    raw["norm_stats"]["other"] = right | {"action": right["action"] | {"q01": low, "q99": high}}
    (folder / "config.json").write_text(json.dumps(raw))
    other = load_policy(folder)
    calibration = states(episodes, tmp_path / "set")
    outcome = check(PolicyDecider(other, folder), calibration, "other")
    assert outcome.best is not None and outcome.best.name == "statistics of libero_object"
    assert outcome.best.remedy == "use --unnorm-key libero_object"
    assert check(PolicyDecider(other, folder), calibration, "libero_object").best is None


def test_commands_refuse_unless_told_otherwise(
    episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    command = ["collect", str(episodes), "--out", str(out), "--samples", str(STATES), "--rotate", "180"]
    checked = [*command, "--policy", str(POLICY)]
    assert main(checked) == 2
    printed = capsys.readouterr()
    assert "images turned by 180 degrees fits clearly better" in printed.err and not out.exists()
    assert printed.err.endswith("collect again with the other --rotate, or go on with --accept-conventions\n")
    assert "<- fits clearly better" in printed.out and "    6" in printed.out
    assert main(command) == 0
    check_set = ["check", "--policy", str(POLICY), "--calibration", str(out)]
    capsys.readouterr()
    assert main(check_set) == 2
    assert "images turned by 180 degrees fits clearly better" in capsys.readouterr().err
    measured = tmp_path / "sensitivity.json"
    sensitivity = ["sensitivity", "--policy", str(POLICY), "--calibration", str(out), "--out", str(measured)]
    sensitivity += ["--units", "projector.fc1", "--choices", "w4a16_g64"]
    assert main(sensitivity) == 2
    assert "or go on with --accept-conventions" in capsys.readouterr().err and not measured.exists()
    assert main([*sensitivity, "--accept-conventions"]) == 0
    assert "kept as they are on request" in capsys.readouterr().out
    assert json.loads(measured.read_text())["conventions"]["accepted"] is True


def test_without_recorded_actions_nothing_is_claimed(policy: Policy, tmp_path: Path) -> None:
    collect([FakeSource((6, 5), state_dim=5)], tmp_path / "set", 4, seed=0)
    outcome = check(PolicyDecider(policy, POLICY), load_calibration(tmp_path / "set"), None)
    assert outcome.require(False, "--flag").summary == "conventions not checked: the states have no recorded actions"


def test_actions_of_another_length_are_told(policy: Policy, episodes: Path, tmp_path: Path) -> None:
    calibration = states(episodes, tmp_path / "set", action(lambda values: values[:3]))
    summary = check(PolicyDecider(policy, POLICY), calibration, None).summary
    assert summary == "conventions not checked: recorded actions have 3 values, the policy's 7"


def fit(errors: Any, correlation: float) -> Fit:
    from calibrator.conventions.fit import Dimension

    return Fit((Dimension(1.0, 1.0, correlation, False),), np.asarray(errors, float), None)


def test_chance_and_single_states_decide_nothing() -> None:
    """By counting: where all of n states agree, chance is 2^-n. Of 2000 pairs without a difference 2 are expected to
    pass the test of ranks alone; more than 8 are once in ten thousand runs."""
    generator = np.random.default_rng(0)
    now = generator.uniform(0.5, 1.5, (2000, 32))
    other = generator.uniform(0.5, 1.5, (2000, 32))
    assert sum(clearly_better(fit(b, 0.9), fit(a, 0.1)) for a, b in zip(now, other, strict=True)) <= 8
    one_large = np.full(32, 0.5)
    one_large[0] = 100
    assert not clearly_better(fit(np.full(32, 0.6), 0.9), fit(one_large, 0.1))
    for count in (9, 10):
        assert clearly_better(fit(np.linspace(0.1, 0.2, count), 0.9), fit(np.linspace(1, 2, count), 0.1)) == (
            2.0**-count <= 1e-3
        )
    assert not clearly_better(fit(np.full(32, 0.1), 0.1), fit(np.full(32, 1.0), 0.2))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"CompressedImage\n": "CompressedImage\n    rotate_180: true\n"}, "images turned by 180 degrees"),
        ({"above_m: 0.0 ": "above_m: 0.08 ", "below_m: 0.08 ": "below_m: 0.0 "}, GRIPPER),
    ],
)
def test_a_bag_of_the_robot_checks_its_contract(
    policy: Policy, tmp_path: Path, changes: dict[str, str], expected: str | None
) -> None:
    """The commands that a node published, turned back by the contract's scales."""
    text = CONTRACT.read_text()
    for before, after in changes.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    (tmp_path / "contract.yaml").write_text(text)
    collect([BagSource(ROOT / "demo/bag", load_contract(tmp_path / "contract.yaml"))], tmp_path / "set", 32, seed=0)
    outcome = check(PolicyDecider(policy, POLICY), load_calibration(tmp_path / "set"), None)
    assert (outcome.best and outcome.best.name) == expected
    assert max(one.correlation for one in outcome.trials) > 0.9


def test_cameras_in_the_other_order_are_found(tmp_path: Path) -> None:
    """Recorded actions are a two-camera policy's own; then its images change places."""
    policy = load_policy(tiny_policy_folder(tmp_path / "policy", images=2))
    decider = PolicyDecider(policy, tmp_path / "policy")
    collect([FakeSource((9, 8, 7), images=2)], tmp_path / "set", 24, seed=0)
    right = load_calibration(tmp_path / "set")
    seen = [right.observation(index) for index in range(len(right))]
    own = np.stack([values for _, values in sorted(decider.first_actions(seen, "tiny"), key=lambda pair: pair[0])])
    right = replace(right, actions=own.astype(np.float32))
    assert check(decider, right, None).best is None

    swapped = replace(
        right,
        images=tuple(others[0] for others in right.further),
        further=tuple((image,) for image in right.images),
    )
    best = check(decider, swapped, None).best
    assert best is not None and best.name == "cameras in reverse order"
    # The same decisions: the recorded ones were kept as float32.
    assert best.error < 1e-6


def test_on_the_robot_the_engine_checks_its_own_bag_without_torch(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    build(Request(policy=POLICY, target=find_target("cpu"), out=engine, uniform=parse_choice("w16a16")))
    text = CONTRACT.read_text()
    (tmp_path / "turned.yaml").write_text(text.replace("CompressedImage\n", "CompressedImage\n    rotate_180: true\n"))
    for name, contract in (("right", CONTRACT), ("turned", tmp_path / "turned.yaml")):
        collect([BagSource(ROOT / "demo/bag", load_contract(contract))], tmp_path / name, 32, seed=0)
        code = "import sys\nfrom calibrator.__main__ import main\n"
        code += f"code = main(['check', '--engine', {str(engine)!r}, '--calibration', {str(tmp_path / name)!r}])\n"
        code += "sys.exit(99 if 'torch' in sys.modules else code)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
        if name == "right":
            assert done.returncode == 0, done.stderr
            assert "no other convention fits better" in done.stdout
        else:
            assert done.returncode == 2, done.stderr
            assert "images turned by 180 degrees fits clearly better" in done.stderr
