"""The outcome of a check as lines of text."""

from calibrator.conventions.check import Outcome


def table(outcome: Outcome) -> str:
    """A row per action value, as recorded; then a row per convention."""
    lines = ["value  mean error      spread  correlation"]
    for number, one in enumerate(outcome.dimensions):
        kind = "  gripper" if one["gripper"] else "" if one["spread"] else "  constant"
        spread = f"{one['spread']:11.4g}" if one["spread"] else f"{'-':>11}"
        lines.append(f"{number:5d} {one['error']:11.4g} {spread} {_number(one['correlation']):>12}{kind}")
    lines.append(f"{'convention':36} {'error':>8} {'correlation':>12} {'gripper':>8}")
    for trial in outcome.trials:
        mark = "  <- fits clearly better" if trial.better else ""
        agreement = "-" if trial.agreement is None else f"{100 * trial.agreement:.0f} %"
        lines.append(f"{trial.name:36} {trial.error:8.3f} {trial.correlation:12.3f} {agreement:>8}{mark}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
