"""Whether the states are as the policy knows them: decided against recorded actions under every convention."""

from markupsafe import Markup

from calibrator.conventions.check import Outcome
from calibrator.report.numbers import significant
from calibrator.report.svg import Scale, Svg, linear_scale

_PITCH, _TOP = 26, 36
_NAME, _ERROR, _CORRELATION, _GRIPPER = 270, (280, 560), (620, 860), (900, 1064)


def conventions_chart(outcome: Outcome) -> Markup:
    """A row per convention: error in units of the recording's spread, correlation, and agreement of the gripper."""
    bottom = _TOP + _PITCH * len(outcome.trials)
    svg = Svg(1080, bottom + 14, "Fit of the decided to the recorded actions under every convention")
    error = linear_scale([trial.error for trial in outcome.trials], *_ERROR)
    correlation, agreement = Scale(-1.0, 1.0, *_CORRELATION), Scale(0.0, 1.0, *_GRIPPER)
    for title, scale in (("error / spread", error), ("correlation", correlation), ("gripper agrees", agreement)):
        svg.text(scale.start, 14, title, "axis")
        zero = scale(0.0)
        svg.line(zero, _TOP - 8, zero, bottom, "base")
    for row, trial in enumerate(outcome.trials):
        y = _TOP + row * _PITCH
        cls = "s-accent" if trial.better or row == 0 else "s-muted"
        svg.text(_NAME, y + 12, trial.name, "axis strong" if trial.better else "label", "end", trial.remedy)
        _bar(svg, error, trial.error, y, cls, significant(trial.error, 3))
        _bar(svg, correlation, trial.correlation, y, cls, f"{trial.correlation:.2f}")
        if trial.agreement is not None:
            _bar(svg, agreement, trial.agreement, y, cls, f"{100 * trial.agreement:.0f} %")
    return svg.render()


def _bar(svg: Svg, scale: Scale, value: float, y: float, cls: str, text: str) -> None:
    zero, end = scale(0.0), scale(value)
    svg.rect(min(zero, end), y, abs(end - zero), 16, cls, text)
    svg.text(max(zero, end) + 6, y + 12, text, "tick")
