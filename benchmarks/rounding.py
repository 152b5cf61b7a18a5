"""What rounding methods leave of a policy's weights: squared error of all live layers, beside round-to-nearest's.

    python benchmarks/rounding.py --policy demo/policies/libero_object
    python benchmarks/rounding.py --policy P --calibration C --held-out D --methods rtn mse gptq

Errors are sums over layers of what is left, divided by the sum of what was there: of weights, and of the layers'
outputs on the inputs of states that no method has seen, E |(Q(W) - W) x|^2 / E |W x|^2.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from calibrator.data.calibration import load_calibration
from calibrator.data.statistics import input_statistics
from calibrator.families import TorchActor, Unit, live_units, load_policy
from calibrator.quantizers import LayerStatistics, parse_choice, quantize
from vla_policy.core.cli import run
from vla_policy.core.formats import Choice


@dataclass(frozen=True)
class Left:
    """What one choice leaves. weights, outputs: relative squared errors; outputs: None without inputs."""

    weights: float
    outputs: float | None
    ns_per_weight: float


@dataclass(frozen=True)
class Inputs:
    """Statistics of the layers' inputs: what methods see, and what outputs are compared on."""

    seen: Mapping[str, LayerStatistics]
    held_out: Mapping[str, LayerStatistics]


def left_by(choice: Choice, units: Sequence[Unit], inputs: Inputs) -> Left:
    """All layers in one choice."""
    lost, held, lost_out, held_out, spent_s = 0.0, 0.0, 0.0, 0.0, 0.0
    for unit in units:
        weight = unit.module.weight.detach()
        started = time.process_time()
        result = quantize(weight, choice, inputs.seen.get(unit.name))
        spent_s += time.process_time() - started
        rows = weight.flatten(1).double()
        change = result.seen_from_outside().flatten(1) - rows
        lost, held = lost + float(change.square().sum()), held + float(rows.square().sum())
        if inputs.held_out:
            moment = inputs.held_out[unit.name].second_moment
            assert moment is not None
            lost_out += float(((change @ moment) * change).sum())
            held_out += float(((rows @ moment) * rows).sum())
    outputs = lost_out / held_out if inputs.held_out else None
    return Left(lost / held, outputs, 1e9 * spent_s / sum(unit.params for unit in units))


def gather(policy: Path, states: Path | None) -> Mapping[str, LayerStatistics]:
    """Of every live layer; nothing without states."""
    if states is None:
        return {}
    actor = TorchActor.load(policy)
    names = [unit.name for unit in live_units(actor.policy)]
    return input_statistics(actor, load_calibration(states), names, str(states), second_moments=True)


def table(units: Sequence[Unit], inputs: Inputs, formats: Sequence[str], methods: Sequence[str]) -> str:
    """One line per format and method, the first method of each format being what the others are compared with."""
    lines = ["| choice | error of weights | against the first | of outputs | against the first | ns per weight |"]
    lines.append("|---|---|---|---|---|---|")
    for name in formats:
        found = [(text, left_by(parse_choice(text), units, inputs)) for text in (f"{name}:{m}" for m in methods)]
        first = found[0][1]
        for text, left in found:
            outputs = "| | "
            if left.outputs is not None and first.outputs is not None:
                outputs = f"| {left.outputs:.3e} | {left.outputs / first.outputs:.3f} "
            weights = f"| {left.weights:.3e} | {left.weights / first.weights:.3f} "
            lines.append(f"| {text} {weights}{outputs}| {left.ns_per_weight:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="states that methods may look at")
    parser.add_argument("--held-out", type=Path, help="states on which the layers' outputs are compared")
    parser.add_argument("--formats", nargs="+", default=["w2a16_g64", "w3a16_g64", "w4a16_g64", "w8a16_g64"])
    parser.add_argument("--methods", nargs="+", default=["rtn", "mse"], help="the others are compared with the first")
    args = parser.parse_args(argv)

    def command() -> int:
        torch.set_num_threads(1)
        inputs = Inputs(gather(args.policy, args.calibration), gather(args.policy, args.held_out))
        print(table(live_units(load_policy(args.policy)), inputs, args.formats, args.methods))
        return 0

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
