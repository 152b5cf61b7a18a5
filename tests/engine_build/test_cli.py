"""The command line: exit codes, one line per error, what inspect prints."""

from pathlib import Path

import pytest

from engine_build.__main__ import main
from vla_policy.core.cli import run


def test_build_then_inspect(workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "engine")
    assert main(["build", "--policy", str(workshop / "policy"), "--uniform", "w4a16_g32", "--out", out]) == 0
    assert "36 units" in capsys.readouterr().out
    assert main(["inspect", out]) == 0
    printed = capsys.readouterr().out
    assert "language_model.lm_head" in printed
    assert "w4a16_g32" in printed


def test_errors_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", "--policy", str(tmp_path / "p"), "--uniform", "w16a16", "--out", str(tmp_path / "e")]
    code = run(lambda: main(arguments))
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "config.json" in captured.err


def test_a_format_without_meaning_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", "--policy", str(tmp_path), "--uniform", "int4", "--out", str(tmp_path / "e")]
    assert run(lambda: main(arguments)) == 2
    assert "format 'int4' is unknown" in capsys.readouterr().err
