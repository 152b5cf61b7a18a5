"""Collection: schema, resuming, dropped failures, folders that refuse to be mixed, answers to other instructions."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from demo import collect as collecting
from demo.collect import Job, claim, collect, episode_path, failure_path, main, task_of
from demo.dataset import load_demonstrations
from demo.teachers import Lesson, LiberoTeacher
from evaluation.benchmarks.base import StepResult
from vla_policy.core.errors import ArtefactError, DataError
from vla_policy.core.observation import Decision, Observation


class FakeTeacher:
    """Counts to five; episodes of the task "hard" fail."""

    name = "fake"
    tasks = ("easy", "hard")
    layout = "line"
    instructions = ("count", "count backwards")

    def __init__(self) -> None:
        self.task = ""
        self.started = 0

    def start(self, task: str, rng: np.random.Generator) -> Observation:
        self.task, self.count, self.offset = task, 0, float(rng.random())
        self.started += 1
        return self._observation()

    def lesson(self) -> Lesson:
        up, down = np.full(7, self.count, np.float64), np.full(7, -self.count, np.float64)
        valid = np.array([True, self.count < 3])
        return Lesson(np.stack([up, down]), valid, np.zeros((2, 6), np.float32), np.zeros((2, 2), np.float32))

    def disturbed(self, action: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return action + rng.normal(0, 10, 7)

    def teachable(self) -> bool:
        return True

    def step(self, action: np.ndarray) -> StepResult:
        self.count += 1
        done = self.count == 5
        return StepResult(self._observation(), done and self.task == "easy", done)

    def close(self) -> None:
        pass

    def _observation(self) -> Observation:
        state = np.array([self.offset, self.count, 0, 0, 0], np.float32)
        return Observation(np.full((224, 224, 3), self.count, np.uint8), f"do {self.task}", state)


class FakeActor:
    """Always the same action; `config` is never asked for."""

    def act(self, observation: Observation) -> Decision:
        return Decision(np.zeros(7, np.int64), np.zeros(7))


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> FakeTeacher:
    fake = FakeTeacher()
    monkeypatch.setattr(collecting, "_BLOCK", 4)  # few episodes reach the second task
    monkeypatch.setattr(collecting, "_tools", lambda job: (fake, None if job.driver == "expert" else FakeActor()))
    return fake


def job_in(out: Path, driver: str = "expert", seed: int = 3) -> Job:
    return Job("fake", out, driver, seed, ("easy", "hard"))


def test_tasks_take_turns_in_blocks() -> None:
    assert "".join(task_of(index, ("a", "b", "c")) for index in range(26)) == "aaaaaaaabbbbbbbbccccccccaa"


def test_episodes_hold_clean_labels_and_failures_are_dropped(tmp_path: Path, teacher: FakeTeacher) -> None:
    outcomes = collect(job_in(tmp_path), 6, workers=1)
    assert [o.kept for o in outcomes] == [True] * 4 + [False] * 2
    assert failure_path(tmp_path, 5).exists() and not episode_path(tmp_path, 5).exists()
    with safe_open(episode_path(tmp_path, 0), "np") as stream:
        columns = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dict)
        metadata = stream.metadata()
    with Image.open(io.BytesIO(columns["png"][: columns["png_end"][0]].tobytes())) as first:
        assert first.size == (112, 112) and first.getpixel((5, 7)) == (0, 0, 0)
    assert len(columns["png_end"]) == 5 and columns["png_end"][-1] == len(columns["png"])
    assert columns["state"].shape == (5, 5) and columns["aux"].shape == (5, 2, 6)
    np.testing.assert_array_equal(columns["action"][:, 0, 0], range(5))
    np.testing.assert_array_equal(columns["valid"][:, 1], [True, True, True, False, False])
    assert metadata["task"] == "easy" and metadata["success"] == "true"
    assert json.loads(metadata["instructions"]) == ["count", "count backwards"]


def test_collecting_again_only_adds_what_is_missing(tmp_path: Path, teacher: FakeTeacher) -> None:
    collect(job_in(tmp_path), 6, workers=1)
    states = load_file(episode_path(tmp_path, 2))["state"]
    episode_path(tmp_path, 2).unlink()
    assert [o.index for o in collect(job_in(tmp_path), 7, workers=1)] == [2, 6]
    np.testing.assert_array_equal(load_file(episode_path(tmp_path, 2))["state"], states)
    assert teacher.started == 8


def test_a_policy_s_failures_are_kept_with_the_expert_s_labels(tmp_path: Path, teacher: FakeTeacher) -> None:
    outcomes = collect(job_in(tmp_path, driver="policy"), 5, workers=1)
    assert [o.success for o in outcomes] == [True] * 4 + [False] and all(o.kept for o in outcomes)
    with safe_open(episode_path(tmp_path, 4), "np") as stream:
        assert stream.metadata()["success"] == "false" and stream.metadata()["driver"] == "policy"
        np.testing.assert_array_equal(stream.get_tensor("action")[:, 0, 0], range(5))


def test_a_folder_belongs_to_one_collection(tmp_path: Path) -> None:
    claim(job_in(tmp_path))
    claim(job_in(tmp_path))
    with pytest.raises(DataError, match="seed is 3, asked for 4; use another --out"):
        claim(job_in(tmp_path, seed=4))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtefactError, match=r"holds thesis\.tex and no collection\.json"):
        claim(job_in(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("arguments", [["--episodes", "0"], ["--episodes", "1", "--workers", "0"]])
def test_senseless_counts_are_refused(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(DataError, match="must be at least 1"):
        main(["--benchmark", "libero_object", "--out", str(tmp_path), *arguments])


def test_one_real_libero_episode(tmp_path: Path) -> None:
    pytest.importorskip("libero", reason="LIBERO is an optional extra")
    task = "pick_up_the_butter_and_place_it_in_the_basket"
    command = ["--benchmark", "libero_object", "--episodes", "1", "--seed", "5", "--tasks", task]
    assert main([*command, "--out", str(tmp_path)]) == 0
    with safe_open(episode_path(tmp_path, 0), "np") as stream:
        action = stream.get_tensor("action")
        instructions = json.loads(stream.metadata()["instructions"])
        valid = stream.get_tensor("valid")
    assert instructions[0] == "pick up the butter and place it in the basket" and len(set(instructions)) == 6
    images = load_demonstrations([tmp_path]).images.float()
    assert len(images) == len(action) > 10
    assert (images.std((1, 2, 3)) > 20).all()
    assert set(action[:, 0, 6]) == {-1.0, 1.0} and np.abs(action[..., :6]).max() <= 1
    assert valid[:, 0].all() and valid[0].sum() >= 4 and not valid[-1, 1:].any()


def test_the_answer_to_another_instruction_leads_to_the_other_object() -> None:
    pytest.importorskip("libero", reason="LIBERO is an optional extra")
    teacher = LiberoTeacher()
    try:
        teacher.start("pick_up_the_butter_and_place_it_in_the_basket", np.random.default_rng(3))
        for _ in range(40):
            lesson = teacher.lesson()
            if not lesson.valid[2]:
                break
            observation = teacher.step(lesson.actions[2]).observation
        assert observation.state is not None
        distances = np.hypot(*(lesson.aux[:, :2] - observation.state[:2]).T)
    finally:
        teacher.close()
    assert distances.argmin() == 2 and distances[2] < 0.03 < np.delete(distances, 2).min()
