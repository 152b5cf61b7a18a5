"""From one line of a comparison to weights: calibration set, sensitivity table, plan, codes, each made once.

What a section's runs share lies under its name and the seed of its states; what is there already is kept, so that a
stopped comparison goes on.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from calibrator.allocation.channel_plan import PUBLISHED_KEEP, ChannelRequest, ChannelSolver, plan_channels
from calibrator.allocation.options import Pin
from calibrator.allocation.plan import Plan
from calibrator.allocation.planning import Limits, Planner, PlanRequest
from calibrator.data.calibration import collect
from calibrator.data.layout import RecordLayout
from calibrator.data.sources import open_sources
from calibrator.modules.chain import Stage
from calibrator.quantize import QuantizeRequest, quantize
from calibrator.sensitivity.channel_table import ChannelTable
from calibrator.sensitivity.channels import ChannelOptions, measure_channels
from calibrator.sensitivity.measure import measure
from calibrator.sensitivity.run import RunOptions
from calibrator.sensitivity.scores import ScoreSettings
from calibrator.sensitivity.sweep import SweepSettings, SweepSpec
from calibrator.sensitivity.table import Objective, Sensitivity, Signal, UnitScores
from calibrator.transform import TransformRequest, transform
from vla_policy.core.formats import FULL, Choice

Control = Literal["random", "depth"]
ChannelSignal = Literal["channels", "channels-greedy"]
"""QVLA: a width for every output channel, by the certified optimum or as published by greedy demotion."""


_QVLA_BITS = (2, 4, 8)


@dataclass(frozen=True)
class Materials:
    """What the runs of a section are made from.

    sources: what `calibrator collect` takes without a contract. samples: calibration states. choices: of a plan's
    layers.
    """

    policy: Path
    sources: tuple[Path, ...]
    samples: int
    choices: tuple[Choice, ...]
    unnorm_key: str | None = None


@dataclass(frozen=True)
class Arm:
    """How a run's layers are rounded: all alike, or by a plan with so many bits on average, or of so many bytes.

    stored_mb: 1e6 bytes of the layers with their scales and operators, what the table shows of every run.
    transform: what the policy goes through first, e.g. `quantvla`. signal: what the plan minimises; a control:
    priorities of layers drawn at random, or falling with depth; or QVLA's widths per output channel, of the choices
    those with 2, 4 and 8 bits. alpha, beta: of Eq. (14a). pins: layers with a fixed choice. choices: of the plan's
    layers, scored and packed alike, in place of the section's. method: rounding of the finished plan in place of what
    was scored. keep: of QVLA, stages with 16 bits. seed: of the calibration states, and of a random control.
    """

    uniform: Choice | None = None
    transform: str | None = None
    average_bits: float | None = None
    stored_mb: float | None = None
    signal: Signal | Control | ChannelSignal = "evidence"
    alpha: float = 0.75
    beta: float = 0.25
    pins: tuple[Pin, ...] = ()
    choices: tuple[Choice, ...] = ()
    method: str | None = None
    keep: tuple[Stage, ...] = PUBLISHED_KEEP
    seed: int = 0


def places(materials: Materials, arm: Arm, folder: Path, name: str) -> tuple[Path, Path]:
    """Where the policy that the arm rounds and the store of its codes are, once they are made: under `folder`."""
    policy = materials.policy
    if arm.transform is not None:
        policy = folder / f"{re.sub('[^a-z0-9]+', '-', arm.transform).strip('-')}-states-{arm.seed}"
    return policy, folder / f"{name}.weights"


def prepare(materials: Materials, arm: Arm, folder: Path, name: str) -> None:
    """Makes what `places` names, as far as it is not there.

    Raises ArtefactError where something there was made from other inputs, and BudgetError for a budget out of reach.
    """
    states = folder / f"states-{arm.seed}"
    if not states.exists():
        collect(open_sources(materials.sources, None, "", RecordLayout()), states, materials.samples, arm.seed)
    policy, weights = places(materials, arm, folder, name)
    of = ""
    if arm.transform is not None:
        if not policy.exists():
            transform(TransformRequest(materials.policy, states, policy, arm.transform, materials.unnorm_key))
        materials, of = replace(materials, policy=policy), f"{policy.name}."
    if arm.choices:
        materials = replace(materials, choices=arm.choices)
        of += hashlib.sha256(" ".join(map(str, arm.choices)).encode()).hexdigest()[:8] + "."
    plan = None
    if arm.uniform is None:
        plan = folder / f"{name}.plan.json"
        if not plan.exists():
            _plan(materials, arm, states, folder, of).save(plan)
    quantize(QuantizeRequest(policy, weights, plan, arm.uniform, arm.method, states, materials.unnorm_key))


def _plan(materials: Materials, arm: Arm, states: Path, folder: Path, of: str) -> Plan:
    """By the table that arms of the same policy, choices and states share.

    of: the policy and the choices, where they are the arm's own.
    """
    if arm.signal == "channels" or arm.signal == "channels-greedy":
        assert arm.average_bits is not None
        channels = _channels(materials, states, folder / f"{of}channels-{arm.seed}.json")
        solver: ChannelSolver = "HIGHS" if arm.signal == "channels" else "GREEDY"
        return plan_channels(channels, ChannelRequest(arm.average_bits, arm.keep, solver))
    return _planner(_table(materials, states, folder / f"{of}table-{arm.seed}.json"), arm, arm.signal).plan()


def _channels(materials: Materials, states: Path, out: Path) -> ChannelTable:
    choices = tuple(choice for choice in materials.choices if choice.format.weight_bits in _QVLA_BITS)
    settings = SweepSettings(choices, unnorm_key=materials.unnorm_key)
    return measure_channels(SweepSpec(str(materials.policy), str(states), settings), out, ChannelOptions())


def _table(materials: Materials, states: Path, out: Path) -> Sensitivity:
    settings = SweepSettings(choices=materials.choices, unnorm_key=materials.unnorm_key)
    spec = SweepSpec(str(materials.policy), str(states), settings)
    return measure(spec, out, ScoreSettings(), RunOptions(first_order=True))


def _planner(table: Sensitivity, arm: Arm, signal: Signal | Control) -> Planner:
    if signal == "random" or signal == "depth":
        table, objective = controlled(table, arm), Objective(1.0, 0.0)
    else:
        objective = Objective(arm.alpha, arm.beta, signal)
    return Planner.of(table, PlanRequest(_limits(table, arm), objective, arm.pins))


def _limits(table: Sensitivity, arm: Arm) -> Limits:
    if arm.stored_mb is None:
        return Limits(average_bits=arm.average_bits)
    beside_mb = table.unquantized_params * FULL.format.weight_bits / 8e6  # a plan's size counts every tensor
    return Limits(size_gb=(arm.stored_mb + beside_mb) / 1e3)


def controlled(table: Sensitivity, arm: Arm) -> Sensitivity:
    """The table with what nobody measured in place of Omega: weights times a layer's priority times 4^-bits.

    4^-bits is how the squared error of rounding falls. Layers that share a choice have one priority: uniform in [0, 1]
    at random, or 1 for the first down to 0 behind the last.
    """
    groups = list(dict.fromkeys(unit.group for unit in table.units))
    if arm.signal == "random":
        priorities = np.random.default_rng(arm.seed).random(len(groups))
    else:
        priorities = 1 - np.arange(len(groups)) / len(groups)
    of_group = dict(zip(groups, priorities.tolist(), strict=True))

    def scores(unit: UnitScores) -> dict[Choice, float]:
        weight = unit.params * of_group[unit.group]
        rounded = {choice: weight * 4.0**-choice.format.weight_bits for choice in table.choices}
        return rounded | {FULL: 0.0}

    return replace(table, units=tuple(replace(unit, omega=scores(unit)) for unit in table.units))
