"""Bit plans: what each layer shall be, checked against policy and target before anything is built."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from calibrator.allocation.plan import Assignment, some_of
from calibrator.quantizers import needs_statistics
from calibrator.quantizers.rows import WHOLE, RowBits
from calibrator.quantizers.store import Store
from engine_build.weights import Layer
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION, Choice, Format, Recipe
from vla_policy.core.targets import Target


@dataclass(frozen=True)
class Plan:
    """A choice per layer, or per part of the layers that `rows` splits.

    parents: sha256 of the files that it comes from, by kind; none for a uniform plan. input_peaks: largest |input| of
    layers with a fixed scale, as it was scored. backend: what its latencies were measured with, if they were.
    """

    assignment: dict[str, Choice]
    parents: Mapping[str, str] = field(default_factory=dict)
    input_peaks: Mapping[str, float] = field(default_factory=dict)
    legalized: tuple[str, ...] = ()
    rows: RowBits = WHOLE
    backend: str | None = None

    @property
    def formats(self) -> dict[str, Format]:
        return {name: choice.format for name, choice in self.assignment.items()}


def load_plan(path: Path, policy_sha256: str, layers: Mapping[str, Layer]) -> Plan:
    """The plan in `path`, made for exactly this policy and naming exactly its layers; else ArtefactError."""
    planned = Assignment.load(path, policy_sha256, list(layers))
    parents = {"plan": planned.sha256}
    return Plan(dict(planned.choices), parents, planned.input_peaks, rows=planned.rows, backend=planned.backend)


def stored_plan(store: Store, policy_sha256: str, layers: Mapping[str, Layer]) -> Plan:
    """What the weights in a store are, made for exactly this policy; else ArtefactError."""
    choices, made = store.choices_of(policy_sha256, layers), store.identity
    of_plan = {"plan": made.parents["plan"]} if "plan" in made.parents else {}
    parents = of_plan | {"weights": store.sha256}
    return Plan(choices, parents, made.input_peaks, rows=made.rows, backend=made.backend)


def check_computable(plan: Plan, command: str) -> None:
    """Raises ArtefactError naming layers whose codes need a calibration set; `command` makes a store of them."""
    asking = [name for name, choice in plan.assignment.items() if needs_statistics(choice.recipe)]
    if asking:
        raise ArtefactError(
            f"plan: the codes of {len(asking)} layers need inputs to look at, e.g. {asking[0]} in "
            f"{plan.assignment[asking[0]]}; call `{command}` and build with --weights"
        )


def uniform_plan(choice: Choice, layers: Iterable[str]) -> Plan:
    """Every layer the same."""
    return Plan(dict.fromkeys(layers, choice))


def check_legal(plan: Plan, layers: Mapping[str, Layer], target: Target) -> None:
    """Raises ArtefactError naming the layers whose format the target cannot run, and why.

    layers: the plan's, of split ones the parts.
    """
    if plan.rows and not target.splits_layers:
        able = [name for name in target.backends if target.on(name).splits_layers]
        remedy = f"build with --backend {able[0]}" if able else "allocate by layers, not by output channels"
        raise ArtefactError(
            f"plan: {some_of(list(plan.rows.bits))} have output channels of several widths, which target {target.name} "
            f"with {target.backend} does not run; {remedy}"
        )
    illegal = {name: why for name, fmt in plan.formats.items() if (why := target.why_not(fmt, layers[name].kind))}
    if illegal:
        first, reason = next(iter(illegal.items()))
        raise ArtefactError(
            f"plan: {len(illegal)} layers have formats that target {target.name} cannot run, e.g. "
            f"{some_of(list(illegal))}: {plan.formats[first]}: {reason}; allocate with --target {target.name}, or "
            "build with --legalize"
        )
    split = [name for names in _groups(layers).values() for name in _odd_ones(plan, names)]
    if target.fuses_groups and split:
        raise ArtefactError(
            f"plan: target {target.name} fuses layers of one input, which must share a format; {some_of(split)} differ "
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
    return replace(plan, assignment=raised, legalized=tuple(changes))


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
