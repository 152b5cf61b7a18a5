"""The sensitivity of a few layers at OpenVLA-7B's real sizes, in bfloat16, with random weights made on the fly.

    python benchmarks/openvla_scale.py --out scale.json                      # 7.4 B parameters, needs 24 GB
    python benchmarks/openvla_scale.py --out scale.json --decoder-layers 2   # same widths, less depth

Times and memory do not depend on the weights' values. The real checkpoint takes the same path through
`python -m calibrator sensitivity --dtype bfloat16 --batch-size 1 --units ...`. The extrapolation to all layers counts
multiply-accumulates of every evaluation (suffix forward, suffix and prefix backward) and divides by the measured rate.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from calibrator.calibration import CalibrationSet, Sample
from calibrator.passes import place_of
from calibrator.policy import OpenVLA, live_units
from calibrator.policy.loading import empty_policy
from calibrator.states import States, reference
from calibrator.sweep import Sweep, SweepSettings, language_block, macs_per_action
from demo.tokenizer import build_tokenizer
from vla_policy.core.cli import run
from vla_policy.core.files import write_json
from vla_policy.core.policy_config import PolicyConfig

INSTRUCTION = "pick up the orange juice and place it in the basket"
_LLAMA_WORDS = 31_744
# One A100: 312 TFLOP/s in bf16, of which dense transformer passes reach about a third.
_A100_FLOPS = 312e12 / 3


def published_config(decoder_layers: int, tower_depth: int | None) -> PolicyConfig:
    """OpenVLA-7B's configuration, optionally with less depth."""
    raw: dict[str, Any] = {
        "model_type": "openvla",
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "text_config": {"num_hidden_layers": decoder_layers},
        "pad_to_multiple_of": 64,
        "n_action_bins": 256,
        "norm_stats": {"scale": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}},
    }
    config = PolicyConfig.from_dict(raw, "published")
    if tower_depth is None:
        return config
    first, second = (replace(tower, depth=tower_depth) for tower in config.towers)
    return replace(config, towers=(first, second))


def random_policy(config: PolicyConfig, seed: int = 0) -> OpenVLA:
    """The policy in bfloat16, every tensor drawn in place: no second copy exists at any time."""
    policy = empty_policy(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(policy.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = torch.empty(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim > 1:
            value.normal_(std=0.02, generator=generator)
        else:
            value.fill_(0.0 if leaf == "bias" else 1.0)
        setattr(policy.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    model = policy.language_model.model
    model.rotary_emb = LlamaRotaryEmbedding(policy.language_model.config)
    return policy.eval()


def random_states(config: PolicyConfig, count: int) -> States:
    """Random images under one instruction."""
    generator = np.random.default_rng(0)
    size = config.image_size
    images = tuple(generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count))
    samples = tuple(Sample(0, "random", step, count, INSTRUCTION) for step in range(count))
    calibration = CalibrationSet(samples, images, (None,) * count, "random")
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer([INSTRUCTION], words=_LLAMA_WORDS).save(f"{folder}/tokenizer.json")
        return States(calibration, config, folder, None, batch=1)


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


def measure(decoder_layers: int, tower_depth: int | None, states_count: int, bits: Sequence[int]) -> dict[str, Any]:
    """Times a few layers of every stage end to end."""
    config = published_config(decoder_layers, tower_depth)
    policy = random_policy(config)
    states = random_states(config, states_count)
    settings = SweepSettings(bits=tuple(bits), group_size=128, dtype="bfloat16")
    started = time.perf_counter()
    ref = reference(policy, states, language_block(policy, settings))
    reference_s = time.perf_counter() - started
    sweep = Sweep(policy, states, ref, settings, cache_bytes=0)
    macs = macs_per_action(policy, states.mean_prompt_tokens, states.codec.dim)
    names = [
        "vision_backbone.featurizer.blocks.0.mlp.fc2",
        "projector.fc2",
        f"language_model.model.layers.{decoder_layers // 2}.mlp.down_proj",
        "language_model.lm_head",
    ]
    rows: list[dict[str, Any]] = []
    for name in names:
        started = time.perf_counter()
        losses = sweep.evaluate(name, settings.bits, tuple(range(states_count)))
        seconds = time.perf_counter() - started
        work = evaluation_macs(policy, macs, name) * len(bits) * states_count
        rows.append({"unit": name, "seconds": seconds, "macs": work, "largest_loss": float(losses.mass.max())})
        print(json.dumps(rows[-1]), flush=True)
    rate = sum(row["macs"] for row in rows) / sum(row["seconds"] for row in rows)
    whole = sum(evaluation_macs(policy, macs, unit.name) for unit in live_units(policy)) * len(bits)
    policy_bytes = sum(parameter.nbytes for parameter in policy.parameters())
    return {
        "decoder_layers": decoder_layers,
        "tower_depth": tower_depth,
        "policy_bytes": policy_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "reference_seconds_per_state": reference_s / states_count,
        "units": rows,
        "macs_per_second": rate,
        "whole_sweep_macs_per_state": whole,
        "whole_sweep_hours_per_100_states_here": whole * 100 / rate / 3600,
        "whole_sweep_hours_per_100_states_a100": whole * 100 * 2 / _A100_FLOPS / 3600,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON with all figures")
    parser.add_argument("--decoder-layers", type=int, default=32, help="32 is the published depth")
    parser.add_argument("--tower-depth", type=int, help="blocks per tower; default as published (24 and 27)")
    parser.add_argument("--states", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    args = parser.parse_args(argv)

    def command() -> int:
        content = measure(args.decoder_layers, args.tower_depth, args.states, args.bits)
        write_json(args.out, {"schema_version": 1, "kind": "scale-benchmark", **content})
        print(json.dumps({key: value for key, value in content.items() if key != "units"}, indent=1))
        return 0

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
