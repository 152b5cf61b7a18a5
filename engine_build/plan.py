"""Bit plans: which format each layer shall have, checked against policy and target before anything is built."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_build.weights import Layer
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import read_json, sha256_file
from vla_policy.core.formats import Format
from vla_policy.core.targets import Target

_NAMED = 3


@dataclass(frozen=True)
class Plan:
    """A format per layer. sha256: of the plan's file; None for a uniform plan."""

    assignment: dict[str, Format]
    sha256: str | None
    legalized: tuple[str, ...] = ()


def load_plan(path: Path, policy_sha256: str, layers: Mapping[str, Layer]) -> Plan:
    """The plan in `path`, made for exactly this policy and naming exactly its layers; else ArtefactError."""
    content = read_json(path, "plan")
    made_for = content.get("policy_sha256")
    if made_for != policy_sha256:
        raise ArtefactError(
            f"{path}: made for the policy with sha256 {str(made_for)[:12]}, this one has {policy_sha256[:12]}; "
            "allocate a plan for this policy"
        )
    raw = content.get("assignment")
    if not isinstance(raw, dict):
        raise ArtefactError(f"{path}: 'assignment' is missing; expected an object from unit to bits and format")
    assignment = {unit: _format(path, unit, entry) for unit, entry in raw.items()}
    _refuse(path, "unknown units", set(assignment) - set(layers), "they are not layers of this policy")
    _refuse(path, "missing units", set(layers) - set(assignment), "every live layer needs a format")
    return Plan({name: assignment[name] for name in layers}, sha256_file(path))


def uniform_plan(fmt: Format, layers: Iterable[str]) -> Plan:
    """Every layer in one format."""
    return Plan(dict.fromkeys(layers, fmt), None)


def check_legal(plan: Plan, layers: Mapping[str, Layer], target: Target) -> None:
    """Raises ArtefactError naming the layers whose format the target cannot run, and why."""
    illegal = {name: why for name, fmt in plan.assignment.items() if (why := target.why_not(fmt, layers[name].kind))}
    if illegal:
        first, reason = next(iter(illegal.items()))
        raise ArtefactError(
            f"plan: {len(illegal)} layers have formats that target {target.name} cannot run, e.g. {_names(illegal)}: "
            f"{plan.assignment[first]}: {reason}; allocate with --target {target.name}, or build with --legalize"
        )
    split = [name for names in _groups(layers).values() for name in _odd_ones(plan, names)]
    if target.fuses_groups and split:
        raise ArtefactError(
            f"plan: target {target.name} fuses layers of one input, which must share a format; {_names(split)} differ "
            "from their neighbours; allocate per group, or build with --legalize"
        )


def legalize(plan: Plan, layers: Mapping[str, Layer], target: Target) -> Plan:
    """The plan with every illegal format raised to the nearest legal one, each change recorded in words."""
    legal = {name: target.nearest(fmt, layers[name].kind) for name, fmt in plan.assignment.items()}
    if target.fuses_groups:
        for names in _groups(layers).values():
            highest = max((legal[name] for name in names), key=lambda fmt: (fmt.weight_bits, fmt.activation_bits))
            legal |= dict.fromkeys(names, highest)
    changes = []
    for name, fmt in legal.items():
        planned = plan.assignment[name]
        if fmt != planned:
            reason = target.why_not(planned, layers[name].kind) or "fused with layers of the same input"
            changes.append(f"{name}: {planned} -> {fmt} ({reason})")
    return Plan(legal, plan.sha256, tuple(changes))


def _format(path: Path, unit: str, entry: Any) -> Format:
    name = entry.get("format") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise ArtefactError(f'{path}: unit {unit!r}: expected {{"bits": .., "format": "w4a16_g64"}}, got {entry!r}')
    fmt = Format.parse(name)
    if entry.get("bits", fmt.weight_bits) != fmt.weight_bits:
        raise ArtefactError(f"{path}: unit {unit!r}: bits {entry['bits']} contradict format {name}; allocate again")
    return fmt


def _groups(layers: Mapping[str, Layer]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for layer in layers.values():
        groups.setdefault(layer.group, []).append(layer.name)
    return groups


def _odd_ones(plan: Plan, names: list[str]) -> list[str]:
    return [name for name in names if plan.assignment[name] != plan.assignment[names[0]]]


def _names(names: Iterable[str]) -> str:
    ordered = list(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(ordered[:_NAMED]) + more


def _refuse(path: Path, what: str, names: set[str], why: str) -> None:
    if names:
        raise ArtefactError(f"{path}: {what}: {_names(sorted(names))}; {why}; allocate a plan for this policy")
