"""The sensitivity of a few layers at OpenVLA-7B's real sizes, in bfloat16, from a checkpoint on disk.

    python benchmarks/openvla_scale.py --checkpoint /data/random-7b --out scale.json    # made if it is not there
    python benchmarks/openvla_scale.py --checkpoint openvla-7b --out scale.json         # the published one
    python benchmarks/openvla_scale.py --checkpoint /data/small --out scale.json --decoder-layers 2 --tower-depth 3

A folder that does not exist is filled with random weights of the published shapes (15 GB): times and memory do not
depend on the weights' values. What is timed is `calibrator.measure`, the command `python -m calibrator sensitivity
--dtype bfloat16 --batch-size 1 --units ...`. Weights of a bfloat16 checkpoint stay in the page cache, mapped from the
file, so memory that they need can be reclaimed; `peak_anonymous_bytes` is what cannot. The extrapolation to all layers
counts multiply-accumulates of every evaluation (suffix forward, backward down to the vision boundary) and of one
full-precision pass per state, and divides by the measured rate.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from calibrator.calibration import SourceIndex, Trajectory, collect
from calibrator.measure import RunOptions, measure
from calibrator.passes import place_of
from calibrator.policy import OpenVLA, live_units
from calibrator.policy.loading import empty_policy
from calibrator.scores import ScoreSettings
from calibrator.sweep import SweepSettings, SweepSpec, macs_per_action
from demo.tokenizer import build_tokenizer
from vla_policy.core.cli import run
from vla_policy.core.files import atomic_folder, write_json
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig

INSTRUCTION = "pick up the orange juice and place it in the basket"
_LLAMA_WORDS = 31_744
_SHARD_BYTES = 1 << 30
# One A100: 312 TFLOP/s in bf16, of which dense transformer passes reach about a third.
_A100_FLOPS = 312e12 / 3


def published_config(decoder_layers: int, tower_depth: int | None) -> dict[str, Any]:
    """OpenVLA-7B's config.json, optionally with less depth."""
    raw: dict[str, Any] = {
        "model_type": "openvla",
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "image_sizes": [224, 224],
        "text_config": {"num_hidden_layers": decoder_layers},
        "pad_to_multiple_of": 64,
        "n_action_bins": 256,
        "norm_stats": {"scale": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}},
    }
    if tower_depth is not None:
        towers = PolicyConfig.from_dict(raw, "published").towers
        raw["vision_towers"] = [asdict(replace(tower, depth=tower_depth)) for tower in towers]
    return raw


def write_random_policy(folder: Path, raw: dict[str, Any], seed: int = 0) -> None:
    """A policy folder with random bfloat16 weights in shards of about 1 GiB; no more than one is in memory."""
    generator = torch.Generator().manual_seed(seed)
    with atomic_folder(folder) as temporary:
        shard: dict[str, torch.Tensor] = {}
        weight_map: dict[str, str] = {}

        def flush() -> None:
            name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, temporary / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, name))
            shard.clear()

        for name, parameter in empty_policy(PolicyConfig.from_dict(raw, "published")).named_parameters():
            value = torch.empty(parameter.shape, dtype=torch.bfloat16)
            if parameter.ndim > 1:
                value.normal_(std=0.02, generator=generator)
            else:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
            shard[name] = value
            if sum(tensor.nbytes for tensor in shard.values()) > _SHARD_BYTES:
                flush()
        flush()
        (temporary / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (temporary / "config.json").write_text(json.dumps(raw))
        build_tokenizer([INSTRUCTION], words=_LLAMA_WORDS).save(str(temporary / "tokenizer.json"))


@dataclass(frozen=True)
class RandomSource:
    """One episode of random images under one instruction."""

    length: int
    size: int = 224
    path: str = "random"

    def index(self) -> SourceIndex:
        return SourceIndex((Trajectory("random", self.length, tuple(range(self.length))),), {})

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[tuple[str, int, Observation]]:
        for step in sorted(wanted.get("random", ())):
            image = np.random.default_rng(step).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
            yield "random", step, Observation(image, INSTRUCTION, None)

    def describe(self) -> dict[str, Any]:
        return {"kind": "random", "path": self.path}


@dataclass
class Stopwatch:
    """Stands in for the progress bar of the sweep and notes when every evaluation ended."""

    ended_s: list[float] = field(default_factory=list)

    def __call__(self, **_: Any) -> "Stopwatch":
        return self

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, _count: int) -> None:
        self.ended_s.append(time.perf_counter())
        print(f"{len(self.ended_s) - 1} layers done", flush=True)


class Anonymous:
    """Largest anonymous memory of this process inside the block: what the kernel cannot drop and read again."""

    peak_bytes = 0

    def __enter__(self) -> "Anonymous":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.peak_bytes = max(self.peak_bytes, int(status["RssAnon"].split()[0]) * 1024)


def evaluation_macs(policy: OpenVLA, macs: dict[str, int], unit: str) -> int:
    """Multiply-accumulates of one evaluation: forward from the layer's block on, backward down to the vision boundary.

    A backward pass with respect to activations costs as much as its forward pass.
    """
    order = [item.name for item in live_units(policy)]
    place = place_of(unit)
    vision = {name for name in order if name.startswith("vision_backbone.")}
    backward = sum(macs[name] for name in order if name not in vision)
    started = False
    forward = 0
    for name in order:
        started = started or place_of(name) == place
        same_tower = name not in vision or place_of(name).part == place.part
        forward += macs[name] if started and same_tower else 0
    return forward + backward


def full_precision_macs(policy: OpenVLA, macs: dict[str, int]) -> int:
    """Multiply-accumulates of the pass that all layers of a state share: forward, and backward to the boundaries."""
    language = sum(count for name, count in macs.items() if not name.startswith("vision_backbone."))
    return sum(macs.values()) + language


def default_units(policy: OpenVLA) -> list[str]:
    """One layer of every stage: a tower, the projector, a decoder block in the middle and a late one."""
    layers = len(policy.language_model.model.layers)
    return [
        "vision_backbone.featurizer.blocks.0.mlp.fc2",
        "projector.fc2",
        f"language_model.model.layers.{layers // 2}.mlp.down_proj",
        f"language_model.model.layers.{layers - 1}.self_attn.q_proj",
    ]


def time_sweep(spec: SweepSpec, out: Path, units: Sequence[str] | None, threads: int | None) -> dict[str, Any]:
    """Runs the calibrator on a few layers and extrapolates to all of them."""
    policy = empty_policy(PolicyConfig.load(spec.policy))
    names = list(units or default_units(policy))
    watch = Stopwatch()
    started = time.perf_counter()
    with Anonymous() as anonymous:
        result = measure(
            spec, out, ScoreSettings(), RunOptions(unit_globs=tuple(names), progress=watch, threads=threads)
        )
    seconds = time.perf_counter() - started
    states, bits = int(result.meta["calibration"]["samples"]), len(spec.settings.bits)
    loaded = spec.load_policy()
    prompt = spec.load_states(loaded)
    macs = macs_per_action(loaded, prompt.mean_prompt_tokens, prompt.codec.dim)
    order = [unit.name for unit in result.units]
    # States one by one, and every layer of a state before the next; the first of them pays for the shared pass.
    spent = np.diff(watch.ended_s).reshape(states, len(order))
    rows = [
        {
            "unit": name,
            "seconds_per_state": spent[:, index].tolist(),
            "macs_per_state": evaluation_macs(policy, macs, name) * bits
            + (full_precision_macs(policy, macs) if index == 0 else 0),
        }
        for index, name in enumerate(order)
    ]
    rate = states * sum(row["macs_per_state"] for row in rows) / float(spent.sum())
    whole = bits * sum(evaluation_macs(policy, macs, unit.name) for unit in live_units(policy))
    whole += full_precision_macs(policy, macs)
    return {
        "states": states,
        "bits": list(spec.settings.bits),
        "policy_bytes": sum(parameter.nbytes for parameter in loaded.parameters()),
        "peak_anonymous_bytes": anonymous.peak_bytes,
        "threads": threads or torch.get_num_threads(),
        "whole_command_seconds": seconds,
        "units": rows,
        "macs_per_second": rate,
        "whole_sweep_macs_per_state": whole,
        "whole_sweep_hours_per_100_states_here": whole * 100 / rate / 3600,
        "whole_sweep_hours_per_100_states_a100": whole * 100 * 2 / _A100_FLOPS / 3600,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="policy folder; made at random if absent")
    parser.add_argument("--out", type=Path, required=True, help="JSON with all figures")
    parser.add_argument("--decoder-layers", type=int, default=32, help="of a checkpoint that is made")
    parser.add_argument("--tower-depth", type=int, help="of a checkpoint that is made; default as published (24, 27)")
    parser.add_argument("--states", type=int, default=1, help="random images")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--units", nargs="+", help="layers; default one of every stage")
    parser.add_argument("--threads", type=int, help="torch threads; default all cores")
    parser.add_argument("--unnorm-key", help="action statistics, needed when the checkpoint has several")
    args = parser.parse_args(argv)

    def command() -> int:
        work = args.out.with_suffix("")
        if not args.checkpoint.exists():
            write_random_policy(args.checkpoint, published_config(args.decoder_layers, args.tower_depth))
        collect([RandomSource(args.states)], work / "calibration", args.states, seed=0)
        settings = SweepSettings(
            bits=tuple(sorted(args.bits)), group_size=128, dtype="bfloat16", unnorm_key=args.unnorm_key
        )
        spec = SweepSpec(str(args.checkpoint), str(work / "calibration"), settings, batch_size=1)
        content = time_sweep(spec, work / "sensitivity.json", args.units, args.threads)
        write_json(args.out, {"schema_version": 1, "kind": "scale-benchmark", **content})
        print(json.dumps(content, indent=1))
        return 0

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
