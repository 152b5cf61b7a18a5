"""What a sweep takes, before it is run: multiply-accumulates, from which the first evaluations, timed, give hours."""

from collections import Counter
from dataclasses import dataclass

from calibrator.families import Policy, live_units
from calibrator.modules.chain import Chain
from calibrator.sensitivity.states import States


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per state. evaluation: by layer, in one choice. shared: of the pass that all layers share.

    An evaluation is a forward pass from the layer's segment on, of the segments that depend on it, and a backward pass
    through the trunk; the shared pass is all segments forward and the trunk backward. A backward pass with respect to
    activations costs as much as its forward pass.
    """

    evaluation: dict[str, int]
    shared: int

    @staticmethod
    def of(policy: Policy, states: States, language_block: int | None = None) -> "Macs":
        """policy: its weights are not looked at."""
        chain, units = policy.chain(language_block), live_units(policy)
        macs: Counter[str] = Counter()
        for unit in units:
            macs[unit.segment] += round(unit.params * unit.tokens(states.mean_prompt_tokens, states.decisions.size))
        trunk = sum(macs[segment.name] for segment in chain.trunk)
        again = {segment.name: sum(macs[name] for name in dependent(chain, segment.name)) for segment in chain.segments}
        return Macs({unit.name: again[unit.segment] + trunk for unit in units}, sum(macs.values()) + trunk)


def dependent(chain: Chain, start: str) -> list[str]:
    """The segments whose values change with that of `start`, itself included."""
    changed = [start]
    for segment in chain.segments:
        if not set(changed).isdisjoint(segment.reads):
            changed.append(segment.name)
    return changed


def shown_time(seconds: float) -> str:
    """For people: seconds, minutes or hours with two digits."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.2g} s"
