"""Deterministic replay: every frame once, hand-made comparisons, thresholds, and the command line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from calibrator.__main__ import main as calibrator
from calibrator.data.calibration import load_calibration
from engine_build.build import Request, build
from evaluation.__main__ import main
from evaluation.replay import run
from evaluation.replay.compare import compare
from evaluation.replay.run import Answers, Recording, answer
from evaluation.replay.thresholds import Thresholds, check, load_thresholds
from tests.core.hostile_images import HOSTILE, PICTURE
from tests.demo.materials import hostile_bag, tiny_bag, tiny_contract
from tests.tiny import overflowing_policy_folder, tiny_policy_folder
from vla_policy.core.contract import Contract, load_contract
from vla_policy.core.errors import ContractError, DataError
from vla_policy.core.formats import FULL
from vla_policy.core.left_out import LeftOut
from vla_policy.core.served import ServedAction
from vla_policy.core.targets import find_target

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy twice (different weights), its contract and its bag."""
    folder = tmp_path_factory.mktemp("replay")
    tiny_policy_folder(folder / "policy", seed=0)
    tiny_policy_folder(folder / "other", seed=1)
    tiny_contract(folder / "contract.yaml")
    tiny_bag(folder / "bag")
    return folder


@pytest.fixture
def contract(material: Path) -> Contract:
    return load_contract(material / "contract.yaml")


def answers(actions: list[list[float]], name: str = "a", episodes: list[int] | None = None) -> Answers:
    """One episode of len(actions) frames unless told otherwise; tokens are the rounded actions."""
    count = len(actions)
    episode = np.asarray(episodes or [0] * count)
    step = np.asarray([int((episode[:row] == episode[row]).sum()) for row in range(count)])
    values = np.asarray(actions)
    return Answers(name, np.arange(count) + 1, episode, step, ("go",) * count, np.rint(values), values, np.ones(count))


def test_errors_flips_and_phases_by_hand(contract: Contract) -> None:
    reference = answers([[0, 0, -1], [0, 0, -1], [0, 0, 1], [0, 0, 1]])
    candidate = answers([[0, 0, -1], [1, 0, 1], [0, -3, -1], [0, 0, 1]], "b")
    result = compare(reference, candidate, contract.action, bins=2, worst=2)
    dx, dy, gripper = result.dimensions
    assert (dx.mean, dx.maximum, dy.mean, dy.maximum) == (0.25, 1.0, 0.75, 3.0)
    assert dx.over_progress == (0.5, 0.0) and dx.by_phase == (0.5, 0.0) and dy.by_phase == (0.0, 1.5)
    assert gripper.mean == 1.0
    assert (result.gripper_flips, result.gripper_disagreement) == ((1, 3), 0.5)
    assert (result.phases, result.identical_frames, result.frames) == ((2, 2), 2, 4)
    assert result.token_agreement == pytest.approx(8 / 12)
    assert [(item.index, item.dimension, item.error) for item in result.worst] == [(2, "dy", 3.0), (1, "gripper", 2.0)]


def test_phases_and_flips_begin_anew_with_an_episode(contract: Contract) -> None:
    run = answers([[0, 0, -1], [0, 0, 1], [0, 0, -1], [0, 0, -1]], episodes=[0, 0, 1, 1])
    result = compare(run, run, contract.action, bins=2, worst=0)
    assert result.phases == (3, 1) and result.gripper_flips == (1, 1)


def test_a_chunk_s_error_is_its_largest_and_its_gripper_the_first_row_s(contract: Contract) -> None:
    still = answers([[0, 0, -1, 0, 0, -1]] * 2)
    moved = answers([[0, 0, -1, 0.25, 0, 1], [0, 0, -1, 0, -0.5, -1]], "b")
    result = compare(still, moved, contract.action, bins=1, worst=1)
    assert [item.maximum for item in result.dimensions] == [0.25, 0.5, 2.0]
    assert result.gripper_disagreement == 0 and result.identical_frames == 0
    with pytest.raises(DataError, match="b answers 6 values per frame, a 3"):
        compare(answers([[0, 0, -1]] * 2), moved, contract.action, 1, 1)


def test_only_common_frames_are_compared(contract: Contract) -> None:
    reference = answers([[0, 0, 0]] * 3)
    late = replace(answers([[1, 0, 0]] * 3, "b"), stamp_ns=np.asarray([3, 4, 5]))
    assert compare(reference, late, contract.action, 2, 1).frames == 1
    with pytest.raises(DataError, match="answered no common frame"):
        compare(reference, replace(late, stamp_ns=np.asarray([7, 8, 9])), contract.action, 2, 1)


def test_two_runs_are_identical_and_every_frame_is_answered_once(material: Path, contract: Contract) -> None:
    from evaluation.actors import ActorSpec

    actor = ActorSpec("policy", material / "policy").load()
    first, second = (answer(Recording(material / "bag"), contract, actor, "policy") for _ in range(2))
    assert first.sha256 == second.sha256 and len(first.stamp_ns) == 20 and first.drops == {}
    assert len(set(first.stamp_ns.tolist())) == 20
    assert first.progress.tolist()[:10] == pytest.approx((np.arange(10) / 9).tolist())


def test_each_threshold_can_pass_and_fail(tmp_path: Path, contract: Contract) -> None:
    reference, candidate = answers([[0, 0, -1], [0, 0, -1]]), answers([[0.5, 0, -1], [0, 0, 1]], "b")
    dropped = (LeftOut("camera", "undecodable", 2, "cut off"),)
    candidate = replace(candidate, left_out=dropped, latency_ms=np.asarray([10.0, 30.0]))
    for name, passing, failing in [
        ("max_mean_error", "{dx: 0.25}", "{dx: 0.2}"),
        ("max_error", "{dx: 0.5}", "{dx: 0.4}"),
        ("min_token_agreement", "0.6", "0.9"),
        ("max_gripper_disagreement", "0.5", "0.4"),
        ("max_added_gripper_flips", "1", "0"),
        ("max_latency_p99_ms", "30", "29"),
        ("max_drops", "2", "1"),
        ("identical", "true", "true"),
    ]:
        for value, passed in ((passing, True), (failing, False)):
            path = tmp_path / "thresholds.yaml"
            path.write_text(f"kind: replay_thresholds\nschema_version: 1\n{name}: {value}\n")
            other = reference if (name, passed) == ("identical", True) else candidate
            compared = compare(reference, other, contract.action, 2, 1)
            checks = {item.name: item.passed for item in check(load(path, contract), other, reference, compared)}
            assert checks.pop("unmatched frames", True) and checks.pop("drops of the reference", True)
            assert list(checks.values()) == [passed], (name, value)


def load(path: Path, contract: Contract) -> Thresholds:
    return load_thresholds(path, contract.action)


def test_what_only_one_side_answered_is_no_agreement(tmp_path: Path, contract: Contract) -> None:
    """The reference knows one of 257 frames; on that one the two are equal, and nothing is dropped."""
    whole = answers([[0, 0, -1]] * 257)
    missing = (LeftOut("served", "unanswered", 256, "2"),)
    one = replace(answers([[0, 0, -1]], "b"), left_out=missing, refused=dict.fromkeys(range(2, 258), "unanswered"))
    path = tmp_path / "thresholds.yaml"
    text = "kind: replay_thresholds\nschema_version: 1\n"
    for reference, candidate in ((one, whole), (whole, one)):
        comparison = compare(reference, candidate, contract.action, 2, 1)
        assert (comparison.frames, comparison.identical_frames) == (1, 1)
        assert comparison.only_reference + comparison.only_candidate == 256

        def failed(thresholds: str) -> list[str]:
            path.write_text(text + thresholds)
            found = check(load(path, contract), candidate, reference, comparison)  # noqa: B023  (called in this round)
            return [item.name for item in found if not item.passed]

        assert failed("identical: true\nmax_drops: 256\n") == ["unmatched frames", "identical"]
        assert failed("max_error: {dx: 1}\n") == ["unmatched frames"]
        assert failed("max_error: {dx: 1}\nmax_unmatched: 256\n") == []
        assert failed("identical: true\nmax_unmatched: 256\n") == ["identical"]
        assert failed("max_drops: 0\n") == ["drops of the reference" if reference is one else "drops"]


def test_frames_that_neither_answered_are_counted(contract: Contract) -> None:
    some, others = {7: "a", 8: "a"}, {8: "b", 9: "a"}
    left, right = (replace(answers([[0, 0, 0]] * 3), refused=refused) for refused in (some, others))
    assert compare(left, right, contract.action, 2, 1).neither == 1


def test_a_stamp_that_comes_again_is_a_frame_of_its_own(contract: Contract) -> None:
    """A looped bag: pairs in order, in the reference's order, whatever the stamps say."""
    stamps = np.asarray([5, 6, 5, 6, 6])
    reference = replace(answers([[row, 0, 0] for row in range(5)], episodes=[0, 0, 1, 1, 1]), stamp_ns=stamps)
    candidate = replace(answers([[row + (row == 3), 0, 0] for row in range(4)]), stamp_ns=stamps[:4])
    result = compare(reference, candidate, contract.action, 1, 1)
    assert (result.frames, result.identical_frames, result.only_reference) == (4, 3, 1)
    assert [(item.index, item.candidate_index, item.stamp_ns) for item in result.worst] == [(3, 3, 6)]


def test_a_gripper_with_hysteresis_flips_as_on_the_robot(contract: Contract) -> None:
    """Values that tremble about the threshold change no choice; each episode begins without one."""
    assert contract.action.gripper is not None
    action = replace(contract.action, gripper=replace(contract.action.gripper, hysteresis=0.5))
    values = [-0.2, 0.2, 0.6, -0.2, -0.6, 0.2, -0.2, 0.2]
    trembling = answers([[0, 0, value] for value in values], episodes=[0, 0, 0, 0, 0, 0, 1, 1])
    assert compare(trembling, trembling, action, 1, 1).gripper_flips == (2, 2)
    assert compare(trembling, trembling, contract.action, 1, 1).gripper_flips == (4, 4)


def test_a_position_s_error_counts_in_halves_of_its_range(contract: Contract) -> None:
    """A joint from 1 to 2 rad that is wrong by 0.3 is worse than one from -2 to 2 rad that is wrong by 0.6."""
    narrow, wide = (
        replace(contract.action.dimensions[0], lower=lower, upper=upper) for lower, upper in ((1.0, 2.0), (-2.0, 2.0))
    )
    action = replace(contract.action, dimensions=(narrow, replace(wide, name="wide")), gripper=None)
    result = compare(answers([[1.5, 0]]), answers([[1.2, 0.6]], "b"), action, 1, 1)
    assert result.worst[0].dimension == narrow.name and result.worst[0].error == pytest.approx(0.6)


def test_chunks_without_tokens_are_compared_by_their_actions(tmp_path: Path, contract: Contract) -> None:
    one, other = (replace(answers([[0.0, 0, 1], [value, 0, 1]]), tokens=np.zeros((2, 0))) for value in (0, 0.5))
    comparison = compare(one, other, contract.action, 2, 1)
    assert comparison.token_agreement is None and comparison.dimensions[0].maximum == 0.5
    path = tmp_path / "thresholds.yaml"
    path.write_text("kind: replay_thresholds\nschema_version: 1\nmin_token_agreement: 0.9\n")
    with pytest.raises(ContractError, match="these engines decide no tokens"):
        check(load(path, contract), other, one, comparison)


def test_the_demo_s_thresholds_bite(tmp_path: Path) -> None:
    """The shipped file, for the shipped contract: what it lets pass, and each thing that it must not."""
    shipped = load_contract(ROOT / "ros2_ws/src/vla_policy/config/libero.yaml")
    thresholds = load(ROOT / "demo/replay_thresholds.yaml", shipped)
    still = np.zeros((100, 7)) - np.eye(7)[6]
    reference = answers(still.tolist())

    def failed(change: np.ndarray, *left_out: LeftOut) -> list[str]:
        candidate = replace(answers((still + change).tolist(), "b"), left_out=left_out)
        found = check(thresholds, candidate, reference, compare(reference, candidate, shipped.action, 2, 1))
        assert len(found) == 8, "every threshold was checked, and that there was nothing to check left out"
        return [item.name for item in found if not item.passed]

    none, grip = np.zeros((100, 7)), np.zeros((100, 7))
    grip[[10, 40], 6] = 2.0
    assert failed(none) == [] and failed(none + 0.04 * np.eye(7)[1]) == []
    assert failed(none + 0.06 * np.eye(7)[1]) == ["mean error dy"]
    assert failed(none, LeftOut("camera", "undecodable", 1, "cut off")) == ["drops"]
    assert failed(grip) == ["added gripper flips"]
    assert failed(none + 2.0 * np.eye(7)[6]) == ["gripper disagreement"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_mean_error: {dq: 1}", r"max_mean_error: unknown key\(s\) dq; known: dx, dy, gripper"),
        ("max_mean_eror: {dx: 1}", "max_mean_eror; did you mean 'max_mean_error'"),
        ("", "checks nothing; set at least one of max_mean_error, .*, max_drops, identical: true"),
        ("identical: false", "checks nothing"),
        ("max_mean_error: {}", "checks nothing"),
        ("max_unmatched: 3", "checks nothing"),
        ("max_drops:", "max_drops: expected int, got None"),
        ("max_drops: -1", "max_drops: expected 0 or more, got -1"),
        ("max_error: {dx: .inf}", "dx: expected a finite number"),
        ("max_error: {dx: -1}", "dx: expected 0 or more, got -1"),
        ("max_latency_p99_ms: .nan", "expected a number above 0, got nan"),
        ("min_token_agreement: 0", r"min_token_agreement: expected a part in \(0, 1\], got 0"),
        ("max_gripper_disagreement: 1", r"max_gripper_disagreement: expected a part in \[0, 1\), got 1"),
    ],
)
def test_threshold_mistakes_are_named(tmp_path: Path, contract: Contract, text: str, message: str) -> None:
    path = tmp_path / "thresholds.yaml"
    path.write_text(f"kind: replay_thresholds\nschema_version: 1\n{text}\n")
    with pytest.raises(ContractError, match=message):
        load(path, contract)


@pytest.mark.parametrize("name", ["max_gripper_disagreement: 0.1", "max_added_gripper_flips: 2"])
def test_a_threshold_on_a_gripper_that_nobody_commands_is_an_error(
    tmp_path: Path, contract: Contract, name: str
) -> None:
    path = tmp_path / "thresholds.yaml"
    path.write_text(f"kind: replay_thresholds\nschema_version: 1\nmax_drops: 0\n{name}\n")
    armless = replace(contract, action=replace(contract.action, gripper=None))
    with pytest.raises(ContractError, match="on the gripper check nothing: the contract commands none"):
        load(path, armless)


def test_a_missing_reference_is_told_before_anything_is_answered(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thresholds = tmp_path / "thresholds.yaml"
    thresholds.write_text("kind: replay_thresholds\nschema_version: 1\nidentical: true\n")
    command = [
        "replay",
        "--bag",
        "/nowhere",
        "--contract",
        str(material / "contract.yaml"),
        "--out",
        str(tmp_path / "o"),
    ]
    command += ["--engine", str(material / "policy"), "--thresholds", str(thresholds)]
    assert main(command) == 2
    assert "need a reference: add --against, --served or --live" in capsys.readouterr().err
    assert main([*command, "--bins", "0"]) == 2
    assert "--bins: expected 1 or more, got 0" in capsys.readouterr().err


def test_the_command_compares_tests_and_reports(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    thresholds = tmp_path / "thresholds.yaml"
    thresholds.write_text("kind: replay_thresholds\nschema_version: 1\nmax_drops: 0\nidentical: true\n")
    common = ["replay", "--bag", str(material / "bag"), "--contract", str(material / "contract.yaml")]
    common += ["--engine", str(material / "policy"), "--thresholds", str(thresholds)]
    assert main([*common, "--against", str(material / "policy"), "--out", str(tmp_path / "same")]) == 0
    assert main([*common, "--against", str(material / "other"), "--out", str(tmp_path / "differs")]) == 1
    assert "FAIL  identical" in capsys.readouterr().out
    suite = ElementTree.parse(tmp_path / "differs/junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("4", "1")
    content = json.loads((tmp_path / "differs/replay.json").read_text())
    assert content["kind"] == "replay" and content["candidate"]["frames"] == 20
    page = (tmp_path / "differs/replay.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 8 and "http://" not in page and 'src="/' not in page


def test_bad_input_is_exit_code_two(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["replay", "--bag", str(tmp_path / "none"), "--contract", str(material / "contract.yaml")]
    arguments += ["--engine", str(material / "policy"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "no such bag" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_engine_that_overflows_is_counted_and_the_rest_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A built engine of finite weights: two of ten states of each episode are too much for it."""
    policy, engine = overflowing_policy_folder(tmp_path / "policy"), tmp_path / "engine"
    build(Request(policy, find_target("cpu"), engine, uniform=FULL))
    contract, bag = tiny_contract(tmp_path / "contract.yaml"), tiny_bag(tmp_path / "bag")
    command = ["replay", "--bag", str(bag), "--contract", str(contract), "--engine", str(engine)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "engine: 16 frames answered, drops {'engine_error': 4}" in printed
    reason = "engine_error 4 (normalised actions: 12 of 12 values are not finite"
    assert f"left out: camera/image_raw/compressed: {reason}" in printed
    content = json.loads((tmp_path / "out/replay.json").read_text())
    assert (content["candidate"]["frames"], content["candidate"]["drops"]) == (16, {"engine_error": 4})
    thresholds = tmp_path / "thresholds.yaml"
    thresholds.write_text("kind: replay_thresholds\nschema_version: 1\nmax_drops: 3\n")
    assert main([*command, "--thresholds", str(thresholds), "--out", str(tmp_path / "tested")]) == 1


def test_an_engine_that_never_decides_is_one_line(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = Path(shutil.copytree(material / "policy", tmp_path / "policy"))
    tensors = load_file(policy / "model.safetensors")
    tensors["language_model.lm_head.weight"].fill_(float("nan"))
    save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    command = ["replay", "--bag", str(material / "bag"), "--contract", str(material / "contract.yaml")]
    assert main([*command, "--engine", str(policy), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    reason = "engine_error 20 (torch policy: logits of the action tokens:"
    assert f"no frame could be served by policy; left out: camera/image_raw/compressed: {reason}" in message
    assert not (tmp_path / "out").exists()


def test_hostile_images_are_counted_and_the_rest_answered_and_collected(material: Path, tmp_path: Path) -> None:
    """By the same decoder: a replay answers, and a calibration set holds, the four pictures of the bag."""
    bag, contract = hostile_bag(tmp_path / "bag"), str(material / "contract.yaml")
    command = ["replay", "--bag", str(bag), "--contract", contract, "--engine", str(material / "policy")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    candidate = json.loads((tmp_path / "out/replay.json").read_text())["candidate"]
    assert (candidate["frames"], candidate["drops"]) == (4, {"undecodable": len(HOSTILE)})
    out = tmp_path / "calibration"
    assert calibrator(["collect", str(bag), "--contract", contract, "--out", str(out), "--samples", "4"]) == 0
    collected = load_calibration(out)
    assert len(collected) == 4 and all(np.array_equal(image, PICTURE) for image in collected.images)


def test_a_recording_drops_what_its_node_did_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two frames are refused in process, one of them is answered live; of two others the node leaves one out, and what
    it answers to the other is no number."""
    refused = {5: "engine_error", 6: "engine_error"}
    frames = replace(
        answers([[0, 0, 0]] * 4),
        left_out=(LeftOut("camera", "engine_error", 2, "too large"), LeftOut("camera", "no_instruction", 1, "none")),
        refused=refused,
    )
    rows = {1: 0.0, 3: float("nan"), 4: 0.0, 5: 0.0}
    served = [
        ServedAction(stamp, 0, 0, 0, np.full((1, 3), value), np.zeros(3, np.int64), "go", "e", 1.0)
        for stamp, value in rows.items()
    ]
    monkeypatch.setattr(run, "read_served", lambda path: iter(served))
    found = run.recorded(Path("served"), frames)
    assert found.stamp_ns.tolist() == [1, 4]
    assert found.drops == {"engine_error": 1, "no_instruction": 1, "unanswered": 2}
    examples = {item.reason: item.example for item in found.left_out}
    assert examples == {"engine_error": "too large", "no_instruction": "none", "unanswered": "the image of 2 ns"}
