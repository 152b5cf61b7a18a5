"""The sensitivity of a few layers at OpenVLA-7B's real sizes, weights held in bfloat16, on a CPU or a GPU.

    python benchmarks/openvla_scale.py --device cuda --out scale.json          # random weights, drawn on the GPU
    python benchmarks/openvla_scale.py --checkpoint /data/random-7b --out scale.json    # made if it is not there
    python benchmarks/openvla_scale.py --checkpoint openvla-7b --out scale.json         # the published one
    python benchmarks/openvla_scale.py --out scale.json --decoder-layers 2 --tower-depth 3   # a trial
    python benchmarks/openvla_scale.py --device cuda --out scale.json --layers 426 --batches 25 --batch-sizes 4 \\
        --choices w2a16_g128 w4a16_g128 w8a16_g128      # the whole sweep: every layer, three choices, 100 states

Times and memory do not depend on the weights' values. Without --checkpoint they are drawn in the device's memory;
a checkpoint folder that does not exist is filled with them (15 GB), and on a CPU its weights stay in the page cache,
mapped from the file: memory that the kernel can take back. `peak_anonymous_bytes` is what it cannot.

What is timed is `calibrator.sensitivity.measure`, the command `python -m calibrator sensitivity --dtype bfloat16
--units ...`, on layers evenly spaced in the order of execution. The extrapolation to all layers counts
multiply-accumulates of every evaluation (suffix forward, backward down to the vision boundary) and of one
full-precision pass per state, and divides by the measured rate; an A100 is taken to reach the same part of its peak as
the GPU that was measured.
"""

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from calibrator.data.calibration import collect
from calibrator.data.records import Record, SourceIndex, Trajectory
from calibrator.families import Policy, live_units
from calibrator.families.loading import check_device, empty_policy, fill_policy, matrix_names
from calibrator.quantizers import parse_choices
from calibrator.sensitivity.cost import Macs
from calibrator.sensitivity.measure import measure
from calibrator.sensitivity.run import RunOptions
from calibrator.sensitivity.scores import ScoreSettings
from calibrator.sensitivity.states import Reference
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec, UnitLosses
from calibrator.tensors import disk_errors
from demo.tokenizer import build_tokenizer
from vla_policy.core.cli import run
from vla_policy.core.families.openvla import FAMILY
from vla_policy.core.files import claim_folder, write_json
from vla_policy.core.formats import Choice
from vla_policy.core.observation import Observation
from vla_policy.core.outputs import FolderKind, atomic_folder, check_file
from vla_policy.core.policy_config import POLICY, PolicyConfig
from vla_policy.core.prismatic.config import PrismaticConfig

_KIND = "scale-benchmark"
_WORK = FolderKind("scale-benchmark", "work.json")
INSTRUCTION = "pick up the orange juice and place it in the basket"
SWEEP_CHOICES = 3
"""Choices per layer of the whole sweep that is extrapolated to."""
_LLAMA_WORDS = 31_744
_SHARD_BYTES = 1 << 30
# Dense bf16 FLOP/s by name of the card, from their data sheets.
_PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
# What dense transformer passes usually reach of a peak: for an A100, where no GPU was measured.
_USUAL_PART = 1 / 3


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
        towers = FAMILY.config(raw, "published").towers
        raw["vision_towers"] = [asdict(replace(tower, depth=tower_depth)) for tower in towers]
    return raw


def random_weights(config: PolicyConfig, device: str, seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a policy, in bfloat16 on `device`, one after another. Words get the logit 0."""
    assert isinstance(config, PrismaticConfig)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in empty_policy(config).named_parameters():
        if parameter.ndim > 1:
            # Drawn in float32: on a CPU bfloat16 numbers are drawn one by one.
            value = torch.randn(parameter.shape, device=device, generator=generator).mul_(0.02)
        else:
            value = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0, device=device)
        if name == "language_model.lm_head.weight":
            value[: config.token_vocab - config.n_action_bins] = 0.0  # a policy answers with actions, never with words
            value[config.token_vocab :] = 0.0
        yield name, value.to(torch.bfloat16)


def write_config(folder: Path, raw: dict[str, Any]) -> None:
    """What a policy folder holds beside its weights."""
    (folder / "config.json").write_text(json.dumps(raw | {"kind": POLICY.name}))
    build_tokenizer([INSTRUCTION], words=_LLAMA_WORDS).save(str(folder / "tokenizer.json"))


def write_random_policy(folder: Path, raw: dict[str, Any]) -> None:
    """A policy folder with random weights in shards of about 1 GiB; no more than one is in memory."""
    with atomic_folder(folder, POLICY) as temporary:
        shard: dict[str, torch.Tensor] = {}
        weight_map: dict[str, str] = {}

        def flush() -> None:
            name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            with disk_errors():
                save_file(shard, temporary / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, name))
            shard.clear()

        for name, value in random_weights(PolicyConfig.from_dict(raw, "published"), "cpu"):
            shard[name] = value
            if sum(tensor.nbytes for tensor in shard.values()) > _SHARD_BYTES:
                flush()
        flush()
        (temporary / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        write_config(temporary, raw)


@dataclass(frozen=True)
class Evaluation:
    """One layer in one choice on the states of a batch; the first of a batch pays for the pass that all share."""

    unit: str
    choice: Choice
    states: int
    seconds: float


EVALUATIONS: list[Evaluation] = []
"""Of the run that is under way."""


class TimedSweep(Sweep):
    """Notes how long each evaluation took."""

    def evaluate(self, unit: str, choices: tuple[Choice, ...], samples: tuple[int, ...]) -> UnitLosses:
        started = time.perf_counter()
        losses = super().evaluate(unit, choices, samples)
        EVALUATIONS.append(Evaluation(unit, choices[0], len(samples), time.perf_counter() - started))
        print(f"{EVALUATIONS[-1].seconds:8.2f} s  {unit} in {choices[0]}", flush=True)
        return losses


class TimedSpec(SweepSpec):
    """Opens a sweep that notes its times."""

    def open(self, ref: Reference | None = None, done: Callable[[int], None] = lambda _: None) -> Sweep:
        sweep = super().open(ref, done)
        sweep.__class__ = TimedSweep
        return sweep


class RandomSpec(TimedSpec):
    """A policy folder without weights: they are drawn in the device's memory whenever it is loaded."""

    def load_policy(self) -> Policy:
        config = PolicyConfig.load(self.policy)
        policy = empty_policy(config)
        narrow = matrix_names(policy)
        drawn = random_weights(config, self.device)
        return fill_policy(policy, {n: v if n in narrow else v.float() for n, v in drawn}, self.device)


@dataclass
class RandomSource:
    """One episode of random images under one instruction."""

    length: int
    size: int = 224
    path: str = "random"

    def index(self) -> SourceIndex:
        return SourceIndex((Trajectory("random", self.length, tuple(range(self.length))),), ())

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[Record]:
        for step in sorted(wanted.get("random", ())):
            image = np.random.default_rng(step).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
            yield Record("random", step, Observation(image, INSTRUCTION, None))

    def describe(self) -> dict[str, Any]:
        return {"kind": "random", "path": self.path}


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


def spread_units(policy: Policy, count: int) -> list[str]:
    """`count` layers evenly spaced in the order of execution."""
    names = [unit.name for unit in live_units(policy)]
    return [names[int((index + 0.5) * len(names) / count)] for index in range(min(count, len(names)))]


def time_sweep(
    spec: SweepSpec, out: Path, count: int, units: Sequence[str] | None, threads: int | None
) -> dict[str, Any]:
    """Runs the calibrator on a few layers and extrapolates to all of them."""
    policy = empty_policy(PolicyConfig.load(spec.policy))
    names = list(units or spread_units(policy, count))
    macs = Macs.of(policy, spec.load_states(policy))
    EVALUATIONS.clear()
    options = RunOptions(unit_globs=tuple(names), threads=threads, resume=False)
    with Anonymous() as anonymous:
        result = measure(spec, out, ScoreSettings(bins=1), options)
    states, device = int(result.meta["calibration"]["samples"]), result.meta["cost"]["device"]
    # The first batch also loads kernels, or weights from a disk, wherever there is a second.
    first = len(names) * len(spec.settings.choices)
    measured = EVALUATIONS[first:] if states > spec.batch_size else EVALUATIONS
    shared = math.ceil(sum(one.states for one in measured) / (len(names) * (len(spec.settings.choices) + 1)))
    rate = (sum(macs.evaluation[one.unit] * one.states for one in measured) + macs.shared * shared) / sum(
        one.seconds for one in measured
    )
    later = {one.unit: one.seconds / one.states for one in reversed(EVALUATIONS[1:])}
    return {
        "batch_size": spec.batch_size,
        "states": states,
        "choices": list(map(str, spec.settings.choices)),
        "threads": threads or torch.get_num_threads(),
        "peak_anonymous_bytes": anonymous.peak_bytes,
        "cost": result.meta["cost"],
        "noise_floor": result.noise_floor,
        "omega": {unit.name: {str(c): value for c, value in unit.omega.items()} for unit in result.units},
        "first_evaluation_seconds_per_state": EVALUATIONS[0].seconds / EVALUATIONS[0].states,
        "seconds_per_evaluation_and_state": later,
        "macs_per_second": rate,
        **extrapolation(SWEEP_CHOICES * sum(macs.evaluation.values()) + macs.shared, rate, device),
    }


def extrapolation(macs: int, rate: float, device: str) -> dict[str, Any]:
    """Hours of the whole sweep per 100 states at the measured `rate` (MAC/s), and on an A100."""
    peak = next((flops for card, flops in _PEAK_FLOPS.items() if card in device), None)
    part = 2 * rate / peak if peak else _USUAL_PART
    return {
        "part_of_peak": part if peak else None,
        "whole_sweep_macs_per_state": macs,
        "whole_sweep_hours_per_100_states_here": macs * 100 / rate / 3600,
        "whole_sweep_hours_per_100_states_a100": macs * 100 * 2 / (_PEAK_FLOPS["A100"] * part) / 3600,
        "a100_part_of_peak_assumed": part,
    }


def make_spec(args: argparse.Namespace, work: Path, batch_size: int) -> SweepSpec:
    """Policy and calibration set on disk, for passes of `batch_size` states."""
    calibration = work / f"calibration-{batch_size}"
    states = args.batches * batch_size
    collect([RandomSource(states)], calibration, states, seed=0)
    settings = SweepSettings(parse_choices(args.choices), dtype="bfloat16", unnorm_key=args.unnorm_key)
    raw = published_config(args.decoder_layers, args.tower_depth)
    if args.checkpoint is None:
        folder = work / "policy"
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, raw)
        return RandomSpec(str(folder), str(calibration), settings, batch_size, args.device)
    if not args.checkpoint.exists():
        write_random_policy(args.checkpoint, raw)
    return TimedSpec(str(args.checkpoint), str(calibration), settings, batch_size, args.device)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="policy folder, made at random if absent; default: no files")
    parser.add_argument("--out", type=Path, required=True, help="JSON with all figures")
    parser.add_argument("--device", default="cpu", help="where the policy runs: cpu, cuda, ...")
    parser.add_argument("--decoder-layers", type=int, default=32, help="of random weights")
    parser.add_argument("--tower-depth", type=int, help="of random weights; default as published (24, 27)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="states per pass, one run for each")
    parser.add_argument("--batches", type=int, default=1, help="of random images in each run")
    parser.add_argument("--choices", nargs="+", default=["w4a16_g128:rtn"], help="what the layers are measured in")
    parser.add_argument("--layers", type=int, default=4, help="how many are measured, evenly spaced in the policy")
    parser.add_argument("--units", nargs="+", help="names of the layers to measure instead")
    parser.add_argument("--threads", type=int, help="torch threads; default all cores")
    parser.add_argument("--unnorm-key", help="action statistics, needed when the checkpoint has several")
    args = parser.parse_args(argv)

    def command() -> int:
        check_device(args.device)
        check_file(args.out, _KIND, [args.checkpoint])
        work = args.out.with_name(f"{args.out.stem}.run")
        claim_folder(work, _WORK)
        runs: list[dict[str, Any]] = []
        for batch_size in args.batch_sizes:
            spec = make_spec(args, work, batch_size)
            out = work / f"batch-{batch_size}" / "sensitivity.json"
            runs.append(time_sweep(spec, out, args.layers, args.units, args.threads))
            # Written after every run: a batch that does not fit the device's memory ends the command.
            write_json(args.out, {"schema_version": 1, "kind": _KIND, "runs": runs})
            print(json.dumps(runs[-1], indent=1), flush=True)
        return 0

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
