"""OpenVLA-7B at its real size: random weights of the published shapes, built, measured, and counted byte by byte.

    python benchmarks/engine.py --target cpu  --out DIR                  build, load, and decide one action
    python benchmarks/engine.py --target a100 --out DIR                  build with TensorRT-RTX, no GPU needed
    python benchmarks/engine.py --target cpu  --out DIR --beside-16-bit  action and memory beside 16 bits

Prints, per kind of bytes, what is on disk, beside the paper's memory column. Needs about 10 GB of disk (twice that for
a100 while building) and up to 20 GB of memory; nothing is downloaded, the weights come from a seed.

ONNX Runtime holds 16-bit weights as float32, 30 GB at full depth. So the last command measures engines in turns, the
mixed one and one of 16 bits for every backend that is installed (OpenVINO's bfloat16 is optional), at two smaller
depths, and says what a straight line makes of 16 bits at 32 blocks: an extrapolation, named as one. `--blocks 1`
measures one block alone. A second run, e.g. with other `--threads`, measures the engines that lie there.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from calibrator.families.loading import empty_policy
from calibrator.quantizers import parse_choice
from engine_build.backends import runs_here
from engine_build.bench import baselines_missing, bench, peak_bytes, report
from engine_build.build import Policy, build_engine, chosen
from engine_build.inspect import summary
from engine_build.plan import Plan, check_legal, uniform_plan
from engine_build.weights import Layer, layers_of
from vla_policy.core.bench import Bench
from vla_policy.core.cli import run
from vla_policy.core.families.openvla import FAMILY
from vla_policy.core.files import claim_folder
from vla_policy.core.formats import FULL
from vla_policy.core.manifest import MANIFEST, Manifest
from vla_policy.core.observation import Observation
from vla_policy.core.outputs import FolderKind
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prismatic.config import PrismaticConfig
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import Target, find_target

_BESIDE = FolderKind("engine-benchmark", "engines.json")
AVERAGE_BITS = 3.96
DEPTH = 32
PAPER_GB = "Mix-QVLA Table 1: 15.2 GB at 16 bits, 4.0 GB at 3.96 bits on average"
_POOL = 1 << 24
_ACTION = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
_CONFIG: dict[str, Any] = {
    "model_type": "openvla",
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "text_config": {"vocab_size": 32064},
    "pad_to_multiple_of": 64,
    "norm_stats": {"random": {"action": _ACTION}},
}
INSTRUCTION = "pick up the orange juice and place it in the basket"


class RandomTensors:
    """Weights of the published shapes: windows into one pool of normal numbers, at an offset drawn per tensor."""

    def __init__(self, config: PolicyConfig, seed: int) -> None:
        self._shapes = {name: tensor.shape for name, tensor in empty_policy(config).state_dict().items()}
        self._pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        self._offsets = np.random.default_rng(seed).integers(0, _POOL, len(self._shapes))
        self._order = {name: index for index, name in enumerate(self._shapes)}

    def tensor(self, name: str) -> torch.Tensor:
        """Standard deviation 1 / sqrt(inputs); norms around 1, LayerScale around 0.1."""
        shape = self._shapes[name]
        offset = int(self._offsets[self._order[name]])
        count = shape.numel()
        pieces = [self._pool[offset : offset + count]]
        missing = count - len(pieces[0])
        pieces += [self._pool] * (missing // _POOL) + [self._pool[: missing % _POOL]]
        values = torch.cat(pieces).reshape(shape) / shape[-1] ** 0.5
        if name.endswith("scale_factor"):
            return 0.1 + values
        return 1 + values if "norm" in name and name.endswith("weight") else values


def plan_at(average_bits: float, layers: dict[str, Layer], activation_bits: int) -> Plan:
    """Towers, projector and head at 8 bits, the decoder at 4, its feed-forward layers from the middle out at 2."""
    a = activation_bits
    four, two, eight = map(parse_choice, (f"w4a{a}_g128", f"w2a{a}_g128", f"w8a{a}"))
    assignment = {name: four if "model.layers." in name else eight for name in layers}
    total = sum(layer.weights for layer in layers.values())
    depth = 1 + max(int(name.split(".")[3]) for name in layers if "model.layers." in name)
    for index in sorted(range(depth), key=lambda place: abs(place - depth / 2)):
        for group in (("gate_proj", "up_proj"), ("down_proj",)):
            bits = sum(layer.weights * assignment[name].format.weight_bits for name, layer in layers.items())
            if bits <= average_bits * total:
                return Plan(assignment)
            assignment |= {f"language_model.model.layers.{index}.mlp.{name}": two for name in group}
    return Plan(assignment)


def config_of(blocks: int) -> PrismaticConfig:
    """The published policy with fewer decoder blocks."""
    text = _CONFIG["text_config"] | {"num_hidden_layers": blocks}
    return FAMILY.config(_CONFIG | {"text_config": text}, "published shapes")


def thinned(average_bits: float, blocks: int, activation_bits: int) -> Plan:
    """The full depth's plan on fewer blocks, evenly taken: their mean is that of all."""
    full = plan_at(average_bits, layers_of(config_of(DEPTH)), activation_bits).assignment
    assignment = {}
    for name in layers_of(config_of(blocks)):
        parts = name.split(".")
        if "model.layers." in name:
            parts[3] = str((2 * int(parts[3]) + 1) * DEPTH // (2 * blocks))
        assignment[name] = full[".".join(parts)]
    return Plan(assignment)


def build_at(blocks: int, plan: Plan, target: Target, out: Path, backend: str | None = None) -> Manifest:
    """An engine of random weights. backend: None for the one that `build` takes."""
    config = config_of(blocks)
    layers = layers_of(config)
    target, _ = chosen(target, backend, plan, layers)
    check_legal(plan, layers, target)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder) / "tokenizer.json")
        policy = Policy(config, RandomTensors(config, seed=0), Path(folder), sha256="0" * 64)
        return build_engine(policy, plan, target, out)


def beside_16_bit(
    average_bits: float, activation_bits: int, depths: Sequence[int], repeats: int, threads: int, out: Path,
    backends: Sequence[str] = (),
) -> str:  # fmt: skip
    """The mixed engine beside 16-bit ones at each of `depths`; with two, 16 bits at the full depth by a straight line
    through both. Engines that lie in `out` from a run before are measured, not built again.

    The mixed engine is on no line: with fewer blocks the same average takes other bits per block.
    backends: what run the mixed plan; none for the one that `build` takes.
    """
    target = find_target("cpu")
    measured: list[Bench] = []
    for depth in depths:
        layers = layers_of(config_of(depth))
        mixed, full = thinned(average_bits, depth, activation_bits), uniform_plan(FULL, layers)
        wanted = [(backend, mixed) for backend in backends or [chosen(target, None, mixed, layers)[0].backend]]
        wanted += [(backend, full) for backend in target.baselines if runs_here(backend)]
        engines = [_built(out, depth, plan, target, backend) for backend, plan in wanted]
        measured.append(bench(engines[0], engines[1:], repeats, threads, warm_up=1))
        print(f"{depth} of {DEPTH} blocks, measured:\n{report(measured[-1])}", flush=True)
        print("\n".join(baselines_missing(measured[-1], target)), flush=True)
    if len(depths) != 2:
        return ""
    lines = [f"{DEPTH} blocks at 16 bits, extrapolated from {depths[0]} and {depths[1]}:"]
    for what, value in (
        ("action, s", lambda figures: figures.stages["action"].median_ms / 1e3),
        ("decode step, s", lambda figures: figures.stages["step"].median_ms / 1e3),
        ("peak memory, GB", lambda figures: figures.peak_bytes / 1e9),
        ("on disk, GB", lambda figures: figures.disk_bytes / 1e9),
    ):
        end = extrapolate((depths[0], depths[1]), (value(measured[0].reference), value(measured[1].reference)))
        lines.append(f"{what:44}{end:16.2f}")
    return "\n".join(lines)


def _built(out: Path, depth: int, plan: Plan, target: Target, backend: str) -> Path:
    """The folder of such an engine, built unless it is there."""
    bits = next(iter(plan.formats.values())).activation_bits
    what = "w16a16" if set(plan.assignment.values()) == {FULL} else f"mixed_a{bits}"
    folder = out / f"{backend}_{what}_{depth}"
    if not (folder / MANIFEST).is_file():
        build_at(depth, plan, target, folder, backend)
    return folder


def extrapolate(depths: tuple[int, int], values: tuple[float, float]) -> float:
    """The straight line through two depths, at the full one."""
    slope = (values[1] - values[0]) / (depths[1] - depths[0])
    return values[1] + slope * (DEPTH - depths[1])


def write_tokenizer(path: Path) -> None:
    """Whole words: enough for one prompt of a policy without meaning."""
    words = ("<unk>", "<s>", "▁", "In:", "Out:", *INSTRUCTION.split())
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(dict.fromkeys(words))}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))


def account(manifest: Manifest) -> str:
    """Bytes on disk by kind, and the plain arithmetic beside them."""
    totals = manifest.totals()
    weights = totals["weights"]
    language = sum(unit.weights for unit in manifest.units if unit.name.startswith("language_model."))
    text = FAMILY.config(manifest.policy_config, "manifest.json").text
    embedding = 2 * text.vocab_size * text.hidden_size
    lines = [
        f"weights of live layers       {weights:>16,}",
        f"codes                        {totals['code_bytes']:>16,} B = {totals['average_bits']} bits per weight",
        f"scales, float16              {totals['scale_bytes']:>16,} B",
        f"embedding, 16 bits           {embedding:>16,} B",
        f"everything else              {totals['other_bytes'] - embedding:>16,} B (norms, biases, positions, graphs)",
        f"engine on disk               {totals['engine_bytes']:>16,} B = {totals['engine_bytes'] / 1e9:.3f} GB",
        f"16-bit arithmetic            {2 * weights + embedding:>16,} B",
        f"8-bit arithmetic             {weights + embedding:>16,} B, embedding at 16 bits",
        f"8 bits, decoder and head     {language:>16,} B, nothing else counted: the paper's W8 figure of 6.6 GB",
        PAPER_GB,
    ]
    return "\n".join(lines)


def decide_once(folder: Path, threads: int) -> str:
    """Loads the engine and decides four actions on a random image: the first finds nothing in memory yet."""
    started = time.perf_counter()
    engine = load_engine(folder, threads=threads)
    load_s = time.perf_counter() - started
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    lines = [f"load {load_s:.1f} s (hashes included)"]
    for what in ("cold", *["warm"] * 3):
        decision, timings = engine.decide(Observation(image, INSTRUCTION))
        calls = ", ".join(f"{call} {milliseconds:.0f}" for call, milliseconds in timings.calls)
        lines.append(f"{what}: action {timings.total_ms / 1e3:.2f} s; calls, ms: {calls}")
    return "\n".join([*lines, f"peak memory {peak_bytes() / 1e9:.2f} GB, tokens {decision.tokens.tolist()}"])


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("cpu", "a100"), default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="engine folder to write")
    parser.add_argument("--average-bits", type=float, default=AVERAGE_BITS, help="bits per weight (default: 3.96)")
    parser.add_argument(
        "--activation-bits", type=int, choices=(8, 16), help="of all layers (default: 8 on the cpu, 16 on the a100)"
    )
    parser.add_argument("--blocks", type=int, help="decoder blocks (default: 32; 8 for --beside-16-bit)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--run-only", action="store_true", help="only decide one action with the engine in --out")
    parser.add_argument("--beside-16-bit", action="store_true", help="action and memory beside 16 bits, on the CPU")
    parser.add_argument(
        "--backends", nargs="+", default=(), choices=find_target("cpu").backends,
        help="beside 16 bits: what run the mixed plan (default: what `build` takes)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="actions per engine beside 16 bits (default: 3)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    activation_bits = arguments.activation_bits or (8 if arguments.target == "cpu" else 16)
    if arguments.beside_16_bit:
        claim_folder(arguments.out, _BESIDE)
        blocks = arguments.blocks or 8
        depths = (blocks // 2, blocks) if blocks > 1 else (1,)
        settings = depths, arguments.repeats, arguments.threads, arguments.out, arguments.backends
        print(beside_16_bit(arguments.average_bits, activation_bits, *settings))
        return 0
    if not arguments.run_only:
        started = time.perf_counter()
        blocks = arguments.blocks or DEPTH
        plan = thinned(arguments.average_bits, blocks, activation_bits)
        manifest = build_at(blocks, plan, find_target(arguments.target), arguments.out)
        print(summary(manifest))
        print(account(manifest))
        builder = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(
            f"built in {time.perf_counter() - started:.0f} s; peak memory {peak_bytes() / 1e9:.2f} GB here, "
            f"{builder / 1e9:.2f} GB in a process that TensorRT ran in",
            flush=True,
        )
    if arguments.target == "cpu":
        print(decide_once(arguments.out, arguments.threads))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
