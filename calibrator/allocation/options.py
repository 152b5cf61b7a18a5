"""What an allocation chooses from: groups of layers, what they can be, and the score and costs of each choice."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from calibrator.quantizers import groups_per_row, operator_bits, parse_choice
from calibrator.sensitivity.table import Objective, Sensitivity, UnitScores
from vla_policy.core.backends.base import LayerKind
from vla_policy.core.errors import ArtefactError, BudgetError
from vla_policy.core.files import read_json
from vla_policy.core.formats import FULL, FULL_PRECISION, Choice, Format
from vla_policy.core.targets import Target

_TABLE_VERSION = 2
SCALE_BITS = 16
PLACE_BITS = 32
"""Of every output channel of a layer whose rows have several widths: an engine puts its result back in order."""
CostName = Literal["code_bits", "size_bits", "bitops", "latency_ms"]


@dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds per action of every layer and format on one target (a `cost_table` of engine_build).

    backend: what ran them. threads: with which. fixed_ms: what no plan can change.
    """

    target: str
    backend: str
    policy_sha256: str
    threads: int
    fixed_ms: float
    units: Mapping[str, Mapping[str, float]]

    @staticmethod
    def load(path: Path | str, policy_sha256: str) -> "LatencyTable":
        """Reads a table. Raises ArtefactError when it is damaged or was measured for another policy."""
        raw = read_json(path, "cost_table", _TABLE_VERSION)
        try:
            table = LatencyTable(
                raw["target"], raw["backend"], raw["policy_sha256"], raw["threads"], raw["fixed_ms"], raw["units"]
            )
        except KeyError as error:
            raise ArtefactError(f"{path}: entry {error} is missing; measure the target again") from error
        if table.policy_sha256 != policy_sha256:
            raise ArtefactError(
                f"{path}: was measured for the policy {table.policy_sha256[:12]}, the scores are of "
                f"{policy_sha256[:12]}; measure the target with this policy's engine"
            )
        return table

    def latency_ms(self, unit: str, fmt: Format) -> float:
        """Raises ArtefactError when the table lacks the layer in this format."""
        try:
            return float(self.units[unit][str(fmt)])
        except KeyError as error:
            raise ArtefactError(
                f"latency table of {self.target}: no entry for {unit} in {fmt}; measure it again"
            ) from error


@dataclass(frozen=True)
class Option:
    """One choice of one group, summed over its layers.

    choice: as the target runs it. score: of the choice that was measured for it, see `offered`. code_bits: N_m b of
    Eq. (14c). size_bits: with scales, 16-bit weights at the plan's float width.
    bitops: MACs times weight bits times activation bits, which is MACs b^2 where both have b bits.
    """

    choice: Choice
    score: float
    code_bits: int
    size_bits: int
    bitops: int
    latency_ms: float

    def cost(self, name: CostName) -> float:
        return float(getattr(self, name))


@dataclass(frozen=True)
class Group:
    """Layers that share one choice because the target fuses them."""

    name: str
    units: tuple[str, ...]
    options: tuple[Option, ...]


def ladder(group: Group) -> list[Option]:
    """The best option of every number of code bits, most bits first."""
    best: dict[int, Option] = {}
    for option in sorted(group.options, key=lambda option: (-option.code_bits, option.score)):
        best.setdefault(option.code_bits, option)
    return list(best.values())


@dataclass(frozen=True)
class Pin:
    """Layers whose names match `glob` get the measured `choice`."""

    glob: str
    choice: Choice

    def __str__(self) -> str:
        return f"{self.glob}={self.choice}"

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.glob)

    @staticmethod
    def parse(text: str) -> "Pin":
        """From `glob=choice`. Raises BudgetError for any other text, ArtefactError for a choice that does not exist."""
        glob, separator, choice = text.partition("=")
        if not separator:
            raise BudgetError(f"--pin {text!r}: expected 'glob=choice', e.g. 'projector.*=w16a16'")
        return Pin(glob, parse_choice(choice))


def offered(choices: Sequence[Choice], target: Target | None, kind: LayerKind) -> dict[Choice, Choice]:
    """What the target runs on layers of a kind, the least precise first, and the measured choice that is its score.

    A measured format that the target lacks stands for the nearest that it runs, which loses nothing against it, unless
    that has other weight bits. What was measured itself is never scored by something else, and of several that are
    equally far the most precise is taken. Without a target nothing is excluded.
    """
    if target is None:
        return {choice: choice for choice in choices}
    found: dict[Choice, Choice] = {}
    for measured in sorted(choices, key=lambda choice: choice.precision):
        nearest = target.nearest(measured.format, kind)
        if nearest.weight_bits == measured.format.weight_bits:
            runs = Choice(nearest, measured.recipe)
            found[runs] = runs if runs in choices else measured
    return dict(sorted(found.items(), key=lambda item: item[0].precision))


def build_groups(
    sensitivity: Sensitivity,
    objective: Objective,
    pins: Sequence[Pin] = (),
    float_bits: int = 16,
    latency: LatencyTable | None = None,
    target: Target | None = None,
) -> list[Group]:
    """Every fused group with its allowed choices. Raises BudgetError for a pin that cannot hold."""
    of_kind = {kind: offered(sensitivity.choices, target, kind) for kind in {unit.kind for unit in sensitivity.units}}
    fixed = _pinned(sensitivity, pins)
    layers: dict[str, list[UnitScores]] = {}
    for unit in sensitivity.units:
        layers.setdefault(unit.group, []).append(unit)
    groups = []
    for name, units in layers.items():
        scored_by = of_kind[units[0].kind]
        runs_as = {measured: runs for runs, measured in scored_by.items()}
        wanted = {fixed[unit.name] for unit in units if unit.name in fixed}
        if len(wanted) > 1:
            pinned = " and ".join(sorted(map(str, wanted)))
            raise BudgetError(f"{name}: pinned to {pinned}, but its layers are fused and share one choice")
        if illegal := [choice for choice in wanted if choice not in runs_as]:
            raise BudgetError(f"{name}: pinned to {illegal[0]}, which the target cannot run; pin another choice")
        allowed = [runs_as[choice] for choice in wanted] or list(scored_by)
        options = tuple(
            _option(units, runs, scored_by[runs], objective, float_bits, latency) for runs in allowed
        )
        groups.append(Group(name, tuple(unit.name for unit in units), options))
    return groups


def _pinned(sensitivity: Sensitivity, pins: Sequence[Pin]) -> dict[str, Choice]:
    fixed: dict[str, Choice] = {}
    for pin in pins:
        if pin.choice not in sensitivity.choices:
            measured = ", ".join(map(str, sensitivity.choices))
            raise BudgetError(f"--pin '{pin}': {pin.choice} was not measured; choose from {measured}")
        matched = [unit.name for unit in sensitivity.units if pin.matches(unit.name)]
        if not matched:
            raise BudgetError(f"--pin '{pin}' matches no layer; names look like {sensitivity.units[0].name}")
        for name in matched:
            if fixed.setdefault(name, pin.choice) != pin.choice:
                raise BudgetError(f"{name}: pinned to {fixed[name]} and to {pin.choice}; keep one of the two")
    return dict.fromkeys(sensitivity.kept, FULL) | fixed


def _option(
    units: Sequence[UnitScores],
    runs: Choice,
    measured: Choice,
    objective: Objective,
    float_bits: int,
    latency: LatencyTable | None,
) -> Option:
    fmt = runs.format
    return Option(
        choice=runs,
        score=sum(objective.score(unit, measured) for unit in units),
        code_bits=sum(unit.params * fmt.weight_bits for unit in units),
        size_bits=sum(
            weight_bits(unit, fmt, float_bits) + added_bits(unit.outputs, unit.inputs, runs) for unit in units
        ),
        bitops=sum(unit.macs * fmt.weight_bits * fmt.activation_bits for unit in units),
        latency_ms=sum(latency.latency_ms(unit.name, fmt) for unit in units) if latency else 0.0,
    )


def weight_bits(unit: UnitScores, fmt: Format, float_bits: int) -> int:
    """Bits of a layer's weight without its scales."""
    return unit.params * (fmt.weight_bits if fmt.weight_bits < FULL_PRECISION.weight_bits else float_bits)


def added_bits(outputs: int, inputs: int, choice: Choice) -> int:
    """Bits of what comes with a matrix's codes: a float16 scale per group of inputs and output, an input operator."""
    if choice.recipe is None:
        return 0
    return outputs * groups_per_row(inputs, choice.format) * SCALE_BITS + operator_bits(choice.recipe, inputs)


def matrix_bits(outputs: int, inputs: int, choice: Choice) -> int:
    """Bits of a matrix with what comes with it; 16-bit weights count 16."""
    return outputs * inputs * choice.format.weight_bits + added_bits(outputs, inputs, choice)


@dataclass(frozen=True)
class Budget:
    """An upper limit on one cost summed over all groups; `label` and `unit` are for people, `scale` converts."""

    cost: CostName
    limit: float
    label: str
    scale: float = 1.0

    def shown(self, value: float) -> str:
        """`value` in the budget's own unit, rounded up: a minimum that is shown can be asked for."""
        value /= self.scale
        step = 10.0 ** (math.floor(math.log10(value)) - 5) if value > 0 else 1.0
        return f"{math.ceil(value / step - 1e-6) * step:.6g}"


def totals(options: Sequence[Option]) -> dict[str, Any]:
    """Score and costs of one option per group, summed in plain Python."""
    return {
        "objective": sum(option.score for option in options),
        "code_bits": sum(option.code_bits for option in options),
        "size_bits": sum(option.size_bits for option in options),
        "bitops": sum(option.bitops for option in options),
        "latency_ms": sum(option.latency_ms for option in options),
    }
