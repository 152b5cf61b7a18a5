"""python -m calibrator report: everything that was measured, on one page that works offline."""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Writes the page that `argv` asks for; returns the exit code. Raises VlaError for what the user can mend."""
    from calibrator.report.command import run_report

    return run_report(argv)
