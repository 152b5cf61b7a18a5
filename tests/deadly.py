"""A sweep whose process is killed in the middle of one layer, and a chore whose process is killed."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from calibrator.sensitivity.states import Reference
from calibrator.sensitivity.sweep import Sweep, SweepSpec, UnitLosses
from vla_policy.core.formats import Choice


def _die(marker: Path, times: int) -> None:
    """Kills this process unless it has happened `times` times, which `marker` counts."""
    killed = marker.read_text() if marker.exists() else ""
    if len(killed) < times:
        marker.write_text(killed + "x")
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class DeadlyChore:
    """Gives its name, but kills its process the first `times` times."""

    name: str
    marker: Path
    times: int

    def __str__(self) -> str:
        return f"chore {self.name}"

    def __call__(self) -> str:
        _die(self.marker, self.times)
        return self.name


class DeadlySweep(Sweep):
    """Kills its own process the first `times` times that `unit` is evaluated; `marker` counts them."""

    marker: Path
    unit: str
    times: int

    def evaluate(self, unit: str, choices: tuple[Choice, ...], samples: tuple[int, ...]) -> UnitLosses:
        losses = super().evaluate(unit, choices, samples)
        if unit == self.unit:
            _die(self.marker, self.times)
        return losses


@dataclass(frozen=True)
class DeadlySpec(SweepSpec):
    """Opens a DeadlySweep, in whatever process it is."""

    marker: str = ""
    unit: str = ""
    times: int = 1

    @staticmethod
    def of(spec: SweepSpec, marker: Path, unit: str, times: int) -> "DeadlySpec":
        plain = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return DeadlySpec(**plain, marker=str(marker), unit=unit, times=times)

    def open(self, ref: Reference | None = None, done: Callable[[int], None] = lambda _: None) -> Sweep:
        sweep = super().open(ref, done)
        sweep.__class__ = DeadlySweep
        assert isinstance(sweep, DeadlySweep)
        sweep.marker, sweep.unit, sweep.times = Path(self.marker), self.unit, self.times
        return sweep
