import json
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.stages import Stage, run_stages
from vla_policy.core.errors import ArtefactError


class Chain:
    """Two stages: upper-case a text, then double it; `runs` names those that really ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: list[str] = []
        self.lines: list[str] = []
        self.input = folder / "input.txt"
        self.input.write_text("abc")
        self.code = folder / "code"
        self.code.mkdir()
        (self.code / "module.py").write_text("")

    def stage(self, name: str, source: Path, target: Path, function: Callable[[str], str], **settings: str) -> Stage:
        def run() -> None:
            self.runs.append(name)
            target.write_text(function(source.read_text()))

        return Stage(name, name, (source,), settings, (self.code,), (target,), run)

    def run(self, **settings: str) -> list[bool]:
        upper, double = self.folder / "upper.txt", self.folder / "double.txt"
        stages = [
            self.stage("upper", self.input, upper, str.upper),
            self.stage("double", upper, double, lambda text: text * 2, **settings),
        ]
        return [result.skipped for result in run_stages(stages, self.folder, self.lines.append)]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def test_second_run_skips_everything(chain: Chain) -> None:
    assert chain.run() == [False, False]
    assert (chain.folder / "double.txt").read_text() == "ABCABC"
    assert chain.run() == [True, True]
    assert chain.runs == ["upper", "double"]
    assert chain.lines[-1].startswith("[2/2] double: unchanged")


def test_changed_input_runs_what_depends_on_it(chain: Chain) -> None:
    chain.run()
    chain.input.write_text("xyz")
    assert chain.run() == [False, False]
    assert (chain.folder / "double.txt").read_text() == "XYZXYZ"


def test_input_that_leads_to_the_same_intermediate_stops_there(chain: Chain) -> None:
    chain.run()
    chain.input.write_text("ABC")
    assert chain.run() == [False, True]


def test_changed_setting_runs_only_its_stage(chain: Chain) -> None:
    chain.run(mode="a")
    assert chain.run(mode="b") == [True, False]


def test_changed_code_runs_again(chain: Chain) -> None:
    chain.run()
    (chain.code / "module.py").write_text("pass")
    assert chain.run() == [False, False]


def test_deleted_output_is_made_again(chain: Chain) -> None:
    chain.run()
    (chain.folder / "upper.txt").unlink()
    assert chain.run() == [False, True]


def test_truncated_output_is_refused_and_kept(chain: Chain) -> None:
    chain.run()
    (chain.folder / "upper.txt").write_text("A")
    with pytest.raises(ArtefactError, match=r"upper\.txt: changed or truncated .* delete it"):
        chain.run()
    assert (chain.folder / "upper.txt").read_text() == "A"


def test_failed_stage_leaves_no_record(chain: Chain) -> None:
    chain.input.unlink()
    with pytest.raises(ArtefactError, match=r"input\.txt: cannot be read"):
        chain.run()
    assert list(chain.folder.glob("*.stage.json")) == []


def test_interrupted_stage_runs_again(chain: Chain) -> None:
    target = chain.folder / "slow.txt"

    def interrupt() -> None:
        raise KeyboardInterrupt

    stage = Stage("slow", "slow", (chain.input,), {}, (), (target,), interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_stages([stage], chain.folder, chain.lines.append)
    again = chain.stage("slow", chain.input, target, str.upper)
    assert [result.skipped for result in run_stages([again], chain.folder, chain.lines.append)] == [False]


def test_damaged_record_is_named(chain: Chain) -> None:
    chain.run()
    (chain.folder / "upper.stage.json").write_text(json.dumps({"kind": "stage"})[:-3])
    with pytest.raises(ArtefactError, match=r"upper\.stage\.json: not valid JSON"):
        chain.run()


def test_failed_stage_keeps_the_former_result(chain: Chain) -> None:
    chain.run()

    def refuse(text: str) -> str:
        raise ArtefactError("no")

    double = chain.folder / "double.txt"
    stage = chain.stage("double", chain.folder / "upper.txt", double, refuse, mode="impossible")
    with pytest.raises(ArtefactError, match="no"):
        run_stages([stage], chain.folder, chain.lines.append)
    assert double.read_text() == "ABCABC"
    assert chain.run() == [True, False]
