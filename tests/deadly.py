"""A sweep whose process is killed once, in the middle of one layer."""

import os
import signal
from dataclasses import dataclass, fields
from pathlib import Path

from calibrator.sensitivity.states import Reference
from calibrator.sensitivity.sweep import Sweep, SweepSpec, UnitLosses
from vla_policy.core.formats import Choice


class DeadlySweep(Sweep):
    """Kills its own process the first time `unit` is evaluated; `marker` remembers that it did."""

    marker: Path
    unit: str

    def evaluate(self, unit: str, choices: tuple[Choice, ...], samples: tuple[int, ...]) -> UnitLosses:
        losses = super().evaluate(unit, choices, samples)
        if unit == self.unit and not self.marker.exists():
            self.marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return losses


@dataclass(frozen=True)
class DeadlySpec(SweepSpec):
    """Opens a DeadlySweep, in whatever process it is."""

    marker: str = ""
    unit: str = ""

    @staticmethod
    def of(spec: SweepSpec, marker: Path, unit: str) -> "DeadlySpec":
        plain = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return DeadlySpec(**plain, marker=str(marker), unit=unit)

    def open(self, ref: Reference | None = None) -> Sweep:
        sweep = super().open(ref)
        sweep.__class__ = DeadlySweep
        assert isinstance(sweep, DeadlySweep)
        sweep.marker, sweep.unit = Path(self.marker), self.unit
        return sweep
