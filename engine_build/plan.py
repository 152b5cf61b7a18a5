"""Bit plans: what each layer shall be, checked against policy and target before anything is built."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from calibrator.allocation.plan import Assignment
from engine_build.weights import Layer
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION, Choice, Format, Recipe
from vla_policy.core.targets import Target

_NAMED = 3


@dataclass(frozen=True)
class Plan:
    """A choice per layer. sha256: of the plan's file; None for a uniform plan."""

    assignment: dict[str, Choice]
    sha256: str | None
    legalized: tuple[str, ...] = ()

    @property
    def formats(self) -> dict[str, Format]:
        return {name: choice.format for name, choice in self.assignment.items()}


def load_plan(path: Path, policy_sha256: str, layers: Mapping[str, Layer]) -> Plan:
    """The plan in `path`, made for exactly this policy and naming exactly its layers; else ArtefactError."""
    planned = Assignment.load(path)
    if planned.policy_sha256 != policy_sha256:
        raise ArtefactError(
            f"{path}: made for the policy with sha256 {planned.policy_sha256[:12]}, this one has {policy_sha256[:12]}; "
            "allocate a plan for this policy"
        )
    choices = planned.choices
    _refuse(path, "unknown units", set(choices) - set(layers), "they are not layers of this policy")
    _refuse(path, "missing units", set(layers) - set(choices), "every live layer needs a format")
    return Plan({name: choices[name] for name in layers}, planned.sha256)


def uniform_plan(choice: Choice, layers: Iterable[str]) -> Plan:
    """Every layer the same."""
    return Plan(dict.fromkeys(layers, choice), None)


def check_legal(plan: Plan, layers: Mapping[str, Layer], target: Target) -> None:
    """Raises ArtefactError naming the layers whose format the target cannot run, and why."""
    illegal = {name: why for name, fmt in plan.formats.items() if (why := target.why_not(fmt, layers[name].kind))}
    if illegal:
        first, reason = next(iter(illegal.items()))
        raise ArtefactError(
            f"plan: {len(illegal)} layers have formats that target {target.name} cannot run, e.g. {_names(illegal)}: "
            f"{plan.formats[first]}: {reason}; allocate with --target {target.name}, or build with --legalize"
        )
    split = [name for names in _groups(layers).values() for name in _odd_ones(plan, names)]
    if target.fuses_groups and split:
        raise ArtefactError(
            f"plan: target {target.name} fuses layers of one input, which must share a format; {_names(split)} differ "
            "from their neighbours; allocate per group, or build with --legalize"
        )


def legalize(plan: Plan, layers: Mapping[str, Layer], target: Target) -> Plan:
    """The plan with every illegal format raised to the nearest legal one, each change recorded in words.

    A layer keeps its recipe, unless its weights are raised to 16 bits.
    """
    legal = {name: target.nearest(fmt, layers[name].kind) for name, fmt in plan.formats.items()}
    if target.fuses_groups:
        for names in _groups(layers).values():
            legal |= dict.fromkeys(names, max((legal[name] for name in names), key=lambda fmt: fmt.precision))
    changes = []
    for name, fmt in legal.items():
        planned = plan.formats[name]
        if fmt != planned:
            reason = target.why_not(planned, layers[name].kind) or "fused with layers of the same input"
            changes.append(f"{name}: {planned} -> {fmt} ({reason})")
    raised = {name: Choice(fmt, _recipe(plan.assignment[name], fmt)) for name, fmt in legal.items()}
    return Plan(raised, plan.sha256, tuple(changes))


def _recipe(choice: Choice, fmt: Format) -> Recipe | None:
    """The choice's own recipe, which weights of 16 bits do not have."""
    return choice.recipe if fmt.weight_bits < FULL_PRECISION.weight_bits else None


def _groups(layers: Mapping[str, Layer]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for layer in layers.values():
        groups.setdefault(layer.group, []).append(layer.name)
    return groups


def _odd_ones(plan: Plan, names: list[str]) -> list[str]:
    return [name for name in names if plan.formats[name] != plan.formats[names[0]]]


def _names(names: Iterable[str]) -> str:
    ordered = list(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(ordered[:_NAMED]) + more


def _refuse(path: Path, what: str, names: set[str], why: str) -> None:
    if names:
        raise ArtefactError(f"{path}: {what}: {_names(sorted(names))}; {why}; allocate a plan for this policy")
