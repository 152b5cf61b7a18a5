"""pi0.5 at its published size: random weights, built for the CPU in QuantVLA's layout, and every byte counted.

    python -m benchmarks.pi05_engine --out DIR                language and the expert's MLPs at W4A8, the rest 16 bits
    python -m benchmarks.pi05_engine --out DIR --layout all   every layer at W4A8 but the action projections
    python -m benchmarks.pi05_engine --variant pi0            pi0's layers, counted by their shapes; nothing is built

Prints bytes on disk by part, and beside them what QuantVLA's paper counts: the linear layers of language model and
expert alone, with what no action ever reads of the last prefix block. Needs some 4 GB of disk and 6 GB of memory.
Without --out layers and embedding are counted by their shapes, in seconds.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, processors

from benchmarks.engine import RandomTensors
from calibrator.allocation.options import matrix_bits
from calibrator.families import live_units
from calibrator.families.loading import empty_policy
from calibrator.families.pi05.noise import draw_bank
from calibrator.quantizers import parse_choice
from engine_build.bench import peak_bytes
from engine_build.build import Policy, build_engine, chosen
from engine_build.plan import Plan, check_legal
from engine_build.weights import layers_of
from vla_policy.core.cli import run
from vla_policy.core.families.pi05 import FAMILY
from vla_policy.core.flow.config import FlowConfig, GemmaSpec
from vla_policy.core.flow.noise import NOISE
from vla_policy.core.flow.prompt import TOKENIZER
from vla_policy.core.formats import FULL, Choice
from vla_policy.core.targets import find_target

_LIMITS = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
_CONFIG: dict[str, Any] = {
    "model_type": "pi05",
    "convention": "openpi",
    "normalization": "quantiles",
    "num_images_in_input": 2,
    "norm_stats": {"random": {"action": _LIMITS, "proprio": _LIMITS | {"names": [f"s{n}" for n in range(7)]}}},
}
_PARTS = {
    "vision": ".vision_tower.",
    "projector": ".multi_modal_projector.",
    "language": ".language_model.",
    "expert, attention": ".self_attn.",
    "expert, MLPs": ".mlp.",
    "around the expert": "",
}
"""The first whose mark is in a layer's name. Around the expert are actions, of pi0 also state and time."""
PAPER = "QuantVLA's paper: 4.27 GB at 16 bits, 1.28 GB in this layout"


def published(variant: str) -> FlowConfig:
    """pi0.5 or pi0 at its published size, with two cameras."""
    return FAMILY.config(_CONFIG | {"variant": variant}, "published sizes")


def plan_of(config: FlowConfig, layout: str, choice: Choice) -> Plan:
    """quantvla: language and the expert's MLPs in `choice`, the rest 16 bits. all: all but what plans always keep."""
    policy = empty_policy(config)
    kept = tuple(f"{path}." for path in policy.action_attention())
    assignment = {}
    for unit in live_units(policy):
        rounded = not unit.kept if layout == "all" else unit.stage == "language" and not unit.name.startswith(kept)
        assignment[unit.name] = choice if rounded else FULL
    return Plan(assignment)


def write_files(folder: Path, config: FlowConfig) -> None:
    """What an engine takes as it is: a tokenizer without words, and the noises."""
    tokenizer = Tokenizer(models.WordLevel({"<bos>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.save(str(folder / TOKENIZER))
    np.save(folder / NOISE, draw_bank(config))


def part_of(unit: str) -> str:
    """Of the engine, the part that a layer belongs to."""
    return next(part for part, marker in _PARTS.items() if marker in unit)


@dataclass(frozen=True)
class Size:
    """Weights, and the bytes that they take with their scales."""

    weights: int
    stored: int


def by_shapes(config: FlowConfig, plan: Plan) -> dict[str, Size]:
    """Every layer's size in the plan."""
    return {
        unit.name: Size(unit.params, matrix_bits(unit.outputs, unit.inputs, plan.assignment[unit.name]) // 8)
        for unit in live_units(empty_policy(config))
    }


def parts(layers: Mapping[str, Size], config: FlowConfig) -> dict[str, Size]:
    """Of layers by their names, summed by part, and the prompt's embedding."""
    of_part: dict[str, list[Size]] = {part: [] for part in _PARTS}
    for name, size in layers.items():
        of_part[part_of(name)].append(size)
    found = {part: Size(sum(s.weights for s in sizes), sum(s.stored for s in sizes)) for part, sizes in of_part.items()}
    embedding = config.vocab_size * config.text.hidden_size
    return found | {"prompt embedding": Size(embedding, 2 * embedding)}


def account(sizes: Mapping[str, Size], config: FlowConfig, choice: Choice, on_disk: int | None) -> str:
    """Bytes by part, and the paper's way of counting. on_disk: of a built engine's folder."""
    table = config.num_inference_steps * config.expert.hidden_size
    if config.adaptive:
        table *= 3 * (2 * config.expert.num_hidden_layers + 1)
    replaced = f"   in place of {_time_weights(config):,} weights" if config.adaptive else ""
    lines = [f"{'':22}{'weights':>16}{'bytes':>16}{'bits each':>11}"]
    lines += [_line(part, size) for part, size in sizes.items()]
    lines += [_line("table of steps", Size(table, 4 * table)) + replaced]
    counted = sum(size.stored for size in sizes.values()) + 4 * table
    if on_disk is None:
        lines += [f"{'together':22}{'':>16}{counted:>16,}             by shapes: no norms, biases, positions, graphs"]
    else:
        lines += [
            f"{'everything else':22}{'':>16}{on_disk - counted:>16,}             "
            "norms, biases, positions, noises, graphs",
            f"{'engine on disk':22}{'':>16}{on_disk:>16,}             "
            f"{on_disk / 1e9:.3f} GB, {on_disk / 2**30:.3f} GiB",
        ]
    return "\n".join([*lines, "", *([PAPER] if config.adaptive else []), *_paper(config, choice)])


def _line(name: str, size: Size) -> str:
    return f"{name:22}{size.weights:>16,}{size.stored:>16,}{8 * size.stored / size.weights:>11.2f}"


def _linear(spec: GemmaSpec) -> tuple[int, int]:
    """Weights of a whole block's attention and of its MLP."""
    attention = spec.hidden_size * (2 * spec.query_width + 2 * spec.key_width)
    return attention, 3 * spec.hidden_size * spec.intermediate_size


def _time_weights(config: FlowConfig) -> int:
    width, norms = config.expert.hidden_size, 2 * config.expert.num_hidden_layers + 1
    return 2 * width * width + norms * 3 * width * width


def _paper(config: FlowConfig, choice: Choice) -> list[str]:
    """The same by arithmetic: linear layers of language model and expert, all blocks whole, and nothing else."""
    depth = config.text.num_hidden_layers
    (language_attention, language_mlp), (attention, mlp) = _linear(config.text), _linear(config.expert)
    rounded, kept = depth * (language_attention + language_mlp + mlp), depth * attention
    full = 2 * (rounded + kept)
    small = rounded * choice.format.weight_bits / 8 + 2 * kept
    dead = language_attention + language_mlp - 2 * config.text.hidden_size * config.text.key_width
    return [
        f"counted here: {rounded + kept:,} weights of language model and expert = {full / 1e9:.2f} GB = "
        f"{full / 2**30:.2f} GiB at 16 bits, {small / 1e9:.2f} GB = {small / 2**30:.2f} GiB in this layout without "
        "scales",
        f"of these {dead:,} of the last prefix block are never read by an action, and are in no engine here; the "
        "prompt's embedding, vision and the time's network are not among them",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="engine folder to write (default: none, shapes are counted)")
    parser.add_argument("--variant", choices=("pi05", "pi0"), default="pi05", help="(default: pi05)")
    parser.add_argument("--layout", choices=("quantvla", "all"), default="quantvla", help="(default: quantvla)")
    parser.add_argument("--choice", default="w4a8_g128", help="of the layers that are rounded (default: w4a8_g128)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    config = published(arguments.variant)
    choice = parse_choice(arguments.choice)
    plan = plan_of(config, arguments.layout, choice)
    if arguments.out is None:
        print(account(parts(by_shapes(config, plan), config), config, choice, None))
        return 0
    target, _ = chosen(find_target("cpu"), None, plan, layers_of(config))
    check_legal(plan, layers_of(config), target)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), config)
        policy = Policy(config, RandomTensors(config, seed=0), Path(folder), sha256="0" * 64)
        manifest = build_engine(policy, plan, target, arguments.out)
    layers = {unit.name: Size(unit.weights, unit.code_bytes + unit.scale_bytes) for unit in manifest.units}
    print(account(parts(layers, config), config, choice, manifest.totals()["engine_bytes"]))
    print(f"built in {time.perf_counter() - started:.0f} s; peak memory {peak_bytes() / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
