"""What a sensitivity run is of, and how it is carried out."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from calibrator.families import Policy, live_units
from calibrator.sensitivity.maps import pick_samples
from calibrator.sensitivity.scores import ScoreSettings, phase_of
from calibrator.sensitivity.screening import ScreenSettings
from calibrator.sensitivity.states import States
from calibrator.sensitivity.sweep import SweepSpec
from calibrator.sensitivity.table import UnitShape
from vla_policy.core.errors import PolicyError
from vla_policy.core.files import sha256_folder

_FLOOR_SAMPLES = 2
# What numbers come from, beside settings and libraries.
_CODE = ("conventions", "data", "families", "modules", "quantizers", "sensitivity")


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out. Only `screen` changes the numbers (the others within rounding): with it, most scores
    are estimates. first_order: also the action error's first-order estimate, without `screen`. threads: of torch in
    this process; None takes 1 for a small policy, whose layers are over before a second thread has woken up, and
    torch's own choice otherwise. accept_conventions: go on where the states would fit the policy clearly better under
    another convention. say: hears what a user should know before the run is over.
    """

    executor: str = "local"
    ray_address: str | None = None
    cpus_per_task: int = 1
    resume: bool = True
    unit_globs: tuple[str, ...] = ("*",)
    screen: ScreenSettings | None = None
    first_order: bool = False
    threads: int | None = None
    accept_conventions: bool = False
    progress: Callable[..., Any] = tqdm
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)

    @property
    def estimates(self) -> bool:
        """Whether first-order estimates are computed."""
        return self.first_order or self.screen is not None


def unit_shapes(policy: Policy, states: States) -> list[UnitShape]:
    """Every live layer with its cost per action on these states."""
    return [
        UnitShape(
            name=unit.name,
            label=unit.label,
            stage=unit.stage,
            track=unit.track,
            segment=unit.segment,
            kind=unit.kind,
            group=unit.group,
            inputs=unit.inputs,
            outputs=unit.outputs,
            macs=round(unit.params * unit.tokens(states.mean_prompt_tokens, states.decisions.size)),
        )
        for unit in live_units(policy)
    ]


def choose_units(shapes: Sequence[UnitShape], globs: Sequence[str]) -> list[UnitShape]:
    """The layers whose names match one of `globs`. Raises PolicyError for a glob that matches none."""
    for glob in globs:
        if not any(fnmatchcase(shape.name, glob) for shape in shapes):
            raise PolicyError(f"--units {glob!r} matches no layer; names look like {shapes[0].name}")
    return [shape for shape in shapes if any(fnmatchcase(shape.name, glob) for glob in globs)]


def signature_of(spec: SweepSpec, policy_sha256: str, calibration_sha256: str) -> dict[str, Any]:
    """Everything that the losses of a layer in a choice on a state depend on, apart from rounding."""
    settings = spec.settings.to_json()
    return {
        "policy_sha256": policy_sha256,
        "calibration_sha256": calibration_sha256,
        "settings": {key: value for key, value in settings.items() if key != "choices"},
        "versions": {
            **{name: version(name) for name in ("torch", "transformers", "vla-deploy")},
            "code": sha256_folder(Path(__file__).parents[1], [f"{folder}/**/*.py" for folder in _CODE])[:16],
        },
    }


@dataclass(frozen=True)
class Run:
    """What a measurement is of. policy: without weights. started_s: by the monotonic clock."""

    spec: SweepSpec
    scores: ScoreSettings
    options: RunOptions
    identity: dict[str, Any]
    policy: Policy
    states: States
    shapes: Sequence[UnitShape]
    chosen: Sequence[UnitShape]
    started_s: float

    @property
    def names(self) -> list[str]:
        return [shape.name for shape in self.chosen]

    @property
    def phases(self) -> np.ndarray:
        return phase_of(self.states.calibration.progress, self.scores.bins)

    @property
    def floor_samples(self) -> tuple[int, ...]:
        """The states on which the noise floor is measured."""
        return tuple(pick_samples(self.states.calibration.progress, min(_FLOOR_SAMPLES, len(self.states))))
