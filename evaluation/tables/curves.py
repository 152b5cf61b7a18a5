"""Which runs are one method at several sizes, and which of these differ in their calibration states alone.

Nothing is read from names: the method is what a run's weights are made by, whatever their bits.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from calibrator.sensitivity.table import Signal
from evaluation.actors import ActorSpec
from evaluation.tables.arms import Arm, ChannelSignal, Control
from evaluation.tables.config import PlannedRun
from vla_policy.core.formats import FULL_PRECISION, Choice

_SIGNALS: Mapping[Signal | Control | ChannelSignal, str] = {
    "evidence": "plan by evidence",
    "action": "plan by action",
    "proxy": "plan by action, first order",
    "channels": "QVLA, optimum",
    "channels-greedy": "QVLA, greedy",
    "random": "plan at random",
    "depth": "plan by depth",
}


@dataclass(frozen=True)
class Curve:
    """A method. sizes: its runs from few bits to many; those of one size differ in their calibration states alone."""

    label: str
    sizes: tuple[tuple[PlannedRun, ...], ...]


def curves_of(runs: Sequence[PlannedRun]) -> list[Curve]:
    """Every run in exactly one curve; those of several sizes come first, otherwise in the order of `runs`.

    Methods that one label would name alike are told apart by the name of their smallest run.
    """
    found: dict[Hashable, dict[float, list[PlannedRun]]] = {}
    for run in runs:
        found.setdefault(_method(run), {}).setdefault(nominal_bits(run), []).append(run)
    ladders = [tuple(tuple(sizes[bits]) for bits in sorted(sizes)) for sizes in found.values()]
    labels = [_label(sizes[0][0]) for sizes in ladders]
    curves = [
        Curve(label if labels.count(label) == 1 else f"{label} ({sizes[0][0].name})", sizes)
        for label, sizes in zip(labels, ladders, strict=True)
    ]
    return sorted(curves, key=lambda curve: len(curve.sizes) == 1)


def nominal_bits(run: PlannedRun) -> float:
    """What the configuration asks for: a plan's average or everybody's bits, 16 where it sets no bound to them."""
    if run.arm is not None and run.arm.average_bits is not None:
        return run.arm.average_bits
    alike = _alike(run)
    return (alike.format if alike else FULL_PRECISION).weight_bits


def states_seed(run: PlannedRun) -> int:
    """Which calibration states it was made from."""
    return Arm.seed if run.arm is None else run.arm.seed


def _alike(run: PlannedRun) -> Choice | None:
    """What all its layers are, if they are alike."""
    if run.arm is not None:
        return run.arm.uniform
    return run.rollout.actor.uniform if isinstance(run.rollout.actor, ActorSpec) else None


def _method(run: PlannedRun) -> Hashable:
    """Equal for runs that differ in bits and calibration states alone."""
    alike, rollout = _alike(run), run.rollout
    if run.arm is None and alike is None:
        return run.name
    rounding = None if alike is None else (alike.recipe, alike.format.activation_bits, alike.format.group_size)
    arm = None if run.arm is None else replace(run.arm, uniform=None, average_bits=None, seed=Arm.seed)
    dtype = rollout.actor.dtype if isinstance(rollout.actor, ActorSpec) else None
    return rounding, arm, rollout.control, dtype


def _label(run: PlannedRun) -> str:
    alike, arm = _alike(run), run.arm
    if alike is not None:
        parts = [f"uniform {alike.recipe or ''}".rstrip()]
        if alike.format.activation_bits < FULL_PRECISION.activation_bits:
            parts.append(f"{alike.format.activation_bits}-bit activations")
    elif arm is None:
        return run.name
    else:
        parts = [_SIGNALS[arm.signal], *_details(arm)]
    if arm is not None and arm.transform:
        parts.append(arm.transform)
    if run.rollout.control != "none":
        parts.append(run.rollout.control.replace("_", " "))
    return ", ".join(parts)


def _details(arm: Arm) -> list[str]:
    """Where a plan differs from the usual one."""
    rounding = dict.fromkeys(str(choice.recipe) for choice in arm.choices if choice.recipe)
    kept = arm.keep if arm.signal in ("channels", "channels-greedy") else ()
    return [
        *([f"α {arm.alpha:g}, β {arm.beta:g}"] if (arm.alpha, arm.beta) != (Arm.alpha, Arm.beta) else []),
        *(["pinned"] if arm.pins else []),
        *rounding,
        *([f"then {arm.method}"] if arm.method else []),
        *([f"{' and '.join(kept)} at 16 bits"] if kept else []),
    ]
