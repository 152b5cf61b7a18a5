"""What an allocation chooses from: groups of layers, their widths, and every width's score and costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from calibrator.quantizers.quantization import groups_per_row
from calibrator.sensitivity.table import FULL_BITS, Objective, Sensitivity, UnitScores
from vla_policy.core.errors import ArtefactError, BudgetError
from vla_policy.core.files import read_json
from vla_policy.core.formats import FULL_PRECISION, Format
from vla_policy.core.targets import Target

SCALE_BITS = 16
CostName = Literal["code_bits", "size_bits", "bitops", "latency_ms"]


@dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds per action of every layer and format on one target (a `cost_table` of engine_build).

    fixed_ms: what no plan can change, where the table states it.
    """

    target: str
    policy_sha256: str
    fixed_ms: float
    units: Mapping[str, Mapping[str, float]]

    @staticmethod
    def load(path: Path | str, policy_sha256: str) -> "LatencyTable":
        """Reads a table. Raises ArtefactError when it is damaged or was measured for another policy."""
        raw = read_json(path, "cost_table")
        try:
            table = LatencyTable(raw["target"], raw["policy_sha256"], float(raw.get("fixed_ms", 0.0)), raw["units"])
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
    """One width of one group, summed over its layers.

    code_bits: N_m b of Eq. (14c). size_bits: with scales, 16-bit weights at the plan's float width.
    bitops: MACs times weight bits times activation bits, which is MACs b^2 where both have b bits.
    """

    bits: int
    score: float
    code_bits: int
    size_bits: int
    bitops: int
    latency_ms: float

    def cost(self, name: CostName) -> float:
        return float(getattr(self, name))


@dataclass(frozen=True)
class Group:
    """Layers that share one width because the target fuses them."""

    name: str
    units: tuple[str, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Pin:
    """Layers whose names match `glob` get `bits`."""

    glob: str
    bits: int

    @staticmethod
    def parse(text: str) -> "Pin":
        """From `glob=bits`. Raises BudgetError for any other text."""
        glob, separator, bits = text.rpartition("=")
        if not separator or not bits.isdigit():
            raise BudgetError(f"--pin {text!r}: expected 'glob=bits', e.g. 'projector.*=16'")
        return Pin(glob, int(bits))


def format_of(sensitivity: Sensitivity, bits: int) -> Format:
    """The format that a width means in the scheme that was measured."""
    if bits >= FULL_BITS:
        return FULL_PRECISION
    activation_bits = bits if sensitivity.scheme == "weight-activation" else 16
    return Format(bits, activation_bits, sensitivity.group_size)


def format_on(sensitivity: Sensitivity, bits: int, target: Target | None) -> Format | None:
    """The format that a width gets on `target`: the measured one, or the nearest that the target runs.

    None where no format of that width is legal there. Without a target nothing is excluded.
    """
    measured = format_of(sensitivity, bits)
    if target is None:
        return measured
    nearest = target.nearest(measured)
    return nearest if nearest.weight_bits == bits else None


def build_groups(
    sensitivity: Sensitivity,
    objective: Objective,
    pins: Sequence[Pin] = (),
    float_bits: int = 16,
    latency: LatencyTable | None = None,
    target: Target | None = None,
) -> list[Group]:
    """Every fused group with its allowed widths. Raises BudgetError for a pin that cannot hold."""
    legal = {bits: fmt for bits in sensitivity.bits if (fmt := format_on(sensitivity, bits, target)) is not None}
    fixed = _pinned(sensitivity, pins)
    members: dict[str, list[UnitScores]] = {}
    for unit in sensitivity.units:
        members.setdefault(unit.group, []).append(unit)
    groups = []
    for name, units in members.items():
        wanted = {fixed[unit.name] for unit in units if unit.name in fixed}
        if len(wanted) > 1:
            raise BudgetError(f"{name}: pinned to {sorted(wanted)} bits, but its layers are fused and share one width")
        illegal = sorted(wanted - legal.keys())
        if illegal:
            raise BudgetError(f"{name}: pinned to {illegal[0]} bits, which the target cannot run; pin another width")
        widths = wanted or legal.keys()
        options = tuple(_option(units, bits, legal[bits], objective, float_bits, latency) for bits in sorted(widths))
        groups.append(Group(name, tuple(unit.name for unit in units), options))
    return groups


def _pinned(sensitivity: Sensitivity, pins: Sequence[Pin]) -> dict[str, int]:
    fixed: dict[str, int] = {}
    for pin in pins:
        if pin.bits not in sensitivity.bits:
            widths = ", ".join(map(str, sensitivity.bits))
            raise BudgetError(f"--pin '{pin.glob}={pin.bits}': {pin.bits} bits were not measured; choose from {widths}")
        matched = [unit.name for unit in sensitivity.units if fnmatchcase(unit.name, pin.glob)]
        if not matched:
            raise BudgetError(
                f"--pin '{pin.glob}={pin.bits}' matches no layer; names look like {sensitivity.units[0].name}"
            )
        for name in matched:
            if fixed.setdefault(name, pin.bits) != pin.bits:
                raise BudgetError(f"{name}: pinned to {fixed[name]} and to {pin.bits} bits; keep one of the two")
    return fixed


def _option(
    units: Sequence[UnitScores],
    bits: int,
    fmt: Format,
    objective: Objective,
    float_bits: int,
    latency: LatencyTable | None,
) -> Option:
    return Option(
        bits=bits,
        score=sum(objective.score(unit, bits) for unit in units),
        code_bits=sum(unit.params * bits for unit in units),
        size_bits=sum(weight_bits(unit, fmt, float_bits) + scale_bits(unit, fmt) for unit in units),
        bitops=sum(unit.macs * fmt.weight_bits * fmt.activation_bits for unit in units),
        latency_ms=sum(latency.latency_ms(unit.name, fmt) for unit in units) if latency else 0.0,
    )


def weight_bits(unit: UnitScores, fmt: Format, float_bits: int) -> int:
    """Bits of a layer's weight without its scales."""
    return unit.params * (fmt.weight_bits if fmt.weight_bits < FULL_BITS else float_bits)


def scale_bits(unit: UnitScores, fmt: Format) -> int:
    """Bits of a layer's weight scales: one float16 per group of inputs and output."""
    if fmt.weight_bits >= FULL_BITS:
        return 0
    return unit.outputs * groups_per_row(unit.inputs, fmt) * SCALE_BITS


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


def totals(choice: Sequence[Option]) -> dict[str, Any]:
    """Score and costs of one option per group, summed in plain Python."""
    return {
        "objective": sum(option.score for option in choice),
        "code_bits": sum(option.code_bits for option in choice),
        "size_bits": sum(option.size_bits for option in choice),
        "bitops": sum(option.bitops for option in choice),
        "latency_ms": sum(option.latency_ms for option in choice),
    }
