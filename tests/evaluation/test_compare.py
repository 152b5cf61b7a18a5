"""Pairing two runs, and the table that is made of them."""

from pathlib import Path
from typing import Any

import pytest
from fake_world import FakeEnv, FakeRecipe
from scipy.stats import binomtest

from calibrator.quantizers import parse_choice
from evaluation import __main__ as command
from evaluation.actors import ActorSpec, Size
from evaluation.compare import compare
from evaluation.results import Episode, RolloutResult
from evaluation.rollout import Rollout, run
from evaluation.tables import PlannedRun, Row, Section, read_config, render, run_table
from vla_policy.core.errors import ArtefactError, ContractError, DataError


def result(outcomes: str, task: str = "open", state: str = "s") -> RolloutResult:
    """One episode per character; `+` succeeded."""
    episodes = (Episode(task, trial, mark == "+", 2, 1.5, f"{state}{trial}") for trial, mark in enumerate(outcomes))
    return RolloutResult({"benchmark": "fake"}, tuple(episodes))


def test_pairs_are_counted_and_tested() -> None:
    comparison = compare(result("++++++----"), result("++-----+--"))
    pairs = comparison.pairs
    assert (pairs.both, pairs.only_a, pairs.only_b, pairs.neither) == (2, 4, 1, 3)
    assert comparison.difference == pytest.approx(0.3)
    assert comparison.interval.low < 0.3 < comparison.interval.high
    assert comparison.p_value == pytest.approx(binomtest(1, 5).pvalue)


def test_runs_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(DataError, match="only the first run holds task 'open' trial 2"):
        compare(result("+++"), result("++"))
    with pytest.raises(DataError, match="started from different states"):
        compare(result("+++"), result("+++", state="other"))


def test_a_longer_run_is_restricted_to_a_shorter_one() -> None:
    comparison = compare(result("+-"), result("++-+").restricted_to(result("+-")))
    assert (comparison.pairs.total, comparison.pairs.only_b) == (2, 1)


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result("+++-").write(tmp_path / "a.json")
    result("+---").write(tmp_path / "b.json")
    assert command.main(["rollout", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    out = capsys.readouterr().out
    assert "4 paired episodes: both succeeded 1, only A 2, only B 0, neither 1" in out
    assert "success rate A - B: +50.0 points" in out
    assert "p = 0.5" in out
    (tmp_path / "b.json").write_text("{}")
    assert command.main(["rollout", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "expected kind 'rollout'" in capsys.readouterr().err


def _section(*runs: tuple[str, int], pairs: tuple[tuple[str, str], ...] = ()) -> Section:
    rollout = Rollout("fake", FakeRecipe(), make_env=FakeEnv)
    planned = tuple(PlannedRun(name, rollout, trials) for name, trials in runs)
    return Section("s", "Some tasks", (), planned, None, pairs)


def _cells(text: str, start: str) -> list[list[str]]:
    """The cells of the lines that begin with `start`."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(start)]


def test_table_pairs_every_run_with_the_first() -> None:
    """A shorter run is compared on the initial states that both have, and the table says on how many."""
    text = render(
        [_section(("bf16", 4), ("w2", 2), ("later", 4))],
        {
            "s-bf16": Row(result("+++-"), Size(2_000_000, 32_000_000, 4_000_000)),
            "s-w2": Row(result("+-"), Size(2_000_000, 4_600_000, 700_000)),
        },
    )
    assert "### Some tasks" in text
    ((name, bits, megabytes, counts, rate, against, *_),) = _cells(text, "| bf16")
    assert (name, bits, megabytes, counts, against) == ("bf16", "16.00", "4.00", "3/4", "reference")
    assert rate == "75.0 (30.1 to 95.4)"
    ((_, bits, megabytes, counts, rate, pairs, difference, p, milliseconds),) = _cells(text, "| w2")
    assert (bits, megabytes, counts, pairs, milliseconds) == ("2.30", "0.70", "1/2", "0, 1 of 2", "2")
    assert rate == "50.0 (9.5 to 90.5)" and difference.startswith("-50.0 (") and float(p) == 1.0
    assert "| open | 3/4 |" in text
    assert "later" not in text and "Claims" not in text


def test_claims_are_corrected_together_and_unfinished_ones_count() -> None:
    """p-values are scipy's exact binomial test of the states on which one run alone succeeded.

    Of three claims one is not played, so the smaller p is multiplied by 3 and the other by 2.
    """
    outcomes = {"bf16": "+" * 20, "a": "+" * 18 + "--", "b": "+" * 9 + "-" * 11, "c": "-" + "+" * 14 + "----+"}
    rows = {f"s-{name}": Row(result(marks), Size(8, 128, 16)) for name, marks in outcomes.items()}
    claims = (("a", "b"), ("a", "c"), ("a", "later"))
    text = render([_section(*((name, 20) for name in (*outcomes, "later")), pairs=claims)], rows)
    plain = [binomtest(0, 9).pvalue, binomtest(1, 5).pvalue]
    found = [line for line in _cells(text, "| a") if line[1] in ("b", "c", "later")]
    assert [line[1:3] for line in found] == [["b", "9, 0 of 20"], ["c", "4, 1 of 20"]]
    assert [float(line[4]) for line in found] == pytest.approx(plain, rel=0.05)
    assert [float(line[5]) for line in found] == pytest.approx([3 * plain[0], 2 * plain[1]], rel=0.05)
    assert "all 3 claims of the section; 1 of them, not played yet, count as p = 1." in text


_CONFIG = """
sections:
  - name: mw
    title: Meta-World
    benchmark: metaworld
    policy: policies/metaworld
    tasks: [drawer-open]
    trials: 3
    runs:
      - {name: bf16}
      - {name: w4, uniform: w4a16_g64, trials: 2}
      - {name: blind, control: blind}
"""


def test_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.yaml"
    path.write_text(_CONFIG)
    (section,) = read_config(path)
    assert section.tasks == ("drawer-open",)
    assert [run.trials for run in section.runs] == [3, 2, 3]
    assert [run.rollout.control for run in section.runs] == ["none", "none", "blind"]
    assert [run.rollout.actor for run in section.runs] == [
        ActorSpec("policy", tmp_path / "policies" / "metaworld", uniform=choice)
        for choice in (None, parse_choice("w4a16_g64:mse"), None)
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("control: blind", "control: deaf", r"runs\[2\].control: 'deaf' is unknown"),
        ("uniform: w4a16_g64", "uniform: int4", r"runs\[1\].uniform: format 'int4' is unknown"),
        ("trials: 3", "trails: 3", r"sections\[0\]: key 'trails' is unknown; did you mean 'trials'\?"),
        ("uniform: w4a16_g64", "unifrom: w4a16_g64", r"runs\[1\]: key 'unifrom' is unknown; did you mean 'uniform'\?"),
        ("trials: 3", "trials:", r"sections\[0\]: key 'trials' has no value"),
        ("sections:", "section: []\nsections:", "key 'section' is unknown; did you mean 'sections'"),
        ("    trials: 3\n", "", r"sections\[0\]: key 'trials' is missing"),
        ("benchmark: metaworld", "benchmark: atari", "'atari' is unknown"),
        ("sections:", "parts:", "key 'parts' is unknown; known: sections"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "evaluation.yaml"
    path.write_text(_CONFIG.replace(old, new))
    with pytest.raises(ArtefactError, match=message):
        read_config(path)


def test_a_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.yaml"
    path.write_text(_CONFIG.replace("trials: 3\n", "trials: 3\n    trials: 4\n"))
    with pytest.raises(ContractError, match="key 'trials' stands twice in one mapping"):
        read_config(path)


def test_table_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = Rollout("fake", FakeRecipe(), make_env=FakeEnv)
    blind = Rollout("fake", FakeRecipe(), control="blind", make_env=FakeEnv)
    section = Section("s", "Fake", ("read",), (PlannedRun("bf16", rollout, 4), PlannedRun("blind", blind, 4)))
    monkeypatch.setattr("evaluation.tables.run.read_config", lambda path: [section])
    table = run_table(tmp_path / "unused.yaml", tmp_path / "out", workers=1)
    text = table.read_text()
    assert "| bf16 | 4.00 | 1.50 | 4/4 |" in text
    assert "| blind | 4.00 | 1.50 | 0/4 | 0.0 (0.0 to 49.0) | 0, 4 of 4 | -100.0 (" in text
    journal = tmp_path / "out" / "s-bf16.episodes.jsonl"
    before = journal.read_bytes()
    assert run_table(tmp_path / "unused.yaml", tmp_path / "out", workers=1).read_text() == text
    assert journal.read_bytes() == before


def test_a_table_that_grows_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More trials are asked for, and the call ends after the first run: the second is shown with those it has."""
    rollout = Rollout("fake", FakeRecipe(), make_env=FakeEnv)
    blind = Rollout("fake", FakeRecipe(), control="blind", make_env=FakeEnv)

    def sections(trials: int, other: Rollout) -> list[Section]:
        return [Section("s", "Fake", ("read",), (PlannedRun("bf16", rollout, trials), PlannedRun("b", other, trials)))]

    monkeypatch.setattr("evaluation.tables.run.read_config", lambda path: sections(2, blind))
    run_table(tmp_path / "unused.yaml", tmp_path / "out", workers=1)

    def play(rollout: Rollout, *arguments: Any) -> RolloutResult:
        if rollout.control == "blind":
            raise KeyboardInterrupt
        return run(rollout, *arguments)

    monkeypatch.setattr("evaluation.tables.run.run", play)
    monkeypatch.setattr("evaluation.tables.run.read_config", lambda path: sections(4, blind))
    with pytest.raises(KeyboardInterrupt):
        run_table(tmp_path / "unused.yaml", tmp_path / "out", workers=1)
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| bf16 | 4.00 | 1.50 | 4/4 |" in text
    assert "| b | 4.00 | 1.50 | 0/2 | 0.0 (0.0 to 65.8) | 0, 2 of 2 |" in text
    # A run that has become another one is not shown with the old one's result; its journal refuses it in its turn.
    other = Rollout("fake", FakeRecipe(), seed=8, make_env=FakeEnv)
    monkeypatch.setattr("evaluation.tables.run.read_config", lambda path: sections(4, other))
    with pytest.raises(ArtefactError, match="was made with control = blind, now control = none"):
        run_table(tmp_path / "unused.yaml", tmp_path / "out", workers=1)
    assert _cells((tmp_path / "out" / "table.md").read_text(), "| b |") == []
