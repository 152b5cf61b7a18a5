"""How long each layer takes per action in each legal format: the table that a latency budget is allocated from.

Layers of one shape and number of tokens are measured once. A layer's cost is one pass over the tokens it sees while the
prompt is read, plus one pass of a single token for each decode step. Before every pass as much memory is read as the
policy has weights, as an action's other layers would: a layer timed again and again finds its weights in the cache.

What is left, a layer alone and one inside a graph not taking the same time, is fitted: with a 16-bit engine of the same
kernels beside the planned one, all layers' times are scaled so that the table gives both whole actions as measured.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import helper
from tqdm import tqdm

from calibrator.families import live_units
from calibrator.families.loading import empty_policy
from calibrator.modules.chain import Runs
from calibrator.quantizers import parse_choice, quantize
from engine_build.backends import find_backend
from engine_build.backends.base import Backend
from engine_build.graph.builder import GraphBuilder
from engine_build.weights import Layer, LayerWeights, layers_of
from vla_policy.core.backends.base import parse_version
from vla_policy.core.bench import Bench
from vla_policy.core.formats import FULL_PRECISION, Format
from vla_policy.core.manifest import Manifest, UnitRecord
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.targets import Target

KIND = "cost_table"
PROMPT_TOKENS = 30
_LARGEST_CACHE = 1 << 29
"""Bytes; reading more than any processor keeps would only take time."""
_COPIES = 24
_COPIED_WEIGHTS = 1 << 24
"""Layers of one shape in a graph, and weights of all of them: large layers outweigh the call by themselves."""
_ALIKE = 0.05
"""Part of an action: engines whose layers differ by less say nothing about how layers scale."""
_PLAUSIBLE = 3.0
"""A layer in an engine and one alone do not differ by more, either way, unless something else took the time."""


def cost_table(
    manifest: Manifest,
    formats: Sequence[Format],
    threads: int,
    action_ms: float,
    full_ms: float | None = None,
    repeats: int = 15,
    unnorm_key: str | None = None,
) -> dict[str, Any]:
    """Median milliseconds per action, `{"units": {unit: {format: ms}}}`, measured on this machine.

    action_ms: a whole action of the manifest's engine; what its layers, measured as they were planned, do not account
    for is `fixed_ms`: attention, norms, embedding, preprocessing. full_ms: a whole action of a 16-bit engine, see
    `full_action_ms`, by which `scale` is fitted; where that cannot be it is 1, and `unfitted` says why.

    Raises ArtefactError for a backend whose layers cannot be measured here.
    """
    backend = find_backend(manifest.backend)
    config = manifest.config
    layers, runs = layers_of(config), runs_per_action(config, unnorm_key)
    shapes = {(layer.outputs, layer.inputs, run.tokens) for name, layer in layers.items() for run in runs[name]}
    measured: dict[tuple[int, int, float, Format], float] = {}
    formats = list(dict.fromkeys([FULL_PRECISION, *formats, *(unit.choice.format for unit in manifest.units)]))
    jobs = [(*shape, fmt) for shape in sorted(shapes) for fmt in formats]
    with _Others(sum(layer.weights for layer in layers.values()), threads) as others:
        for outputs, inputs, tokens, fmt in tqdm(jobs, desc="timing layers", unit="shape", disable=None):
            seen = (outputs, inputs, int(tokens))
            measured[outputs, inputs, tokens, fmt] = _milliseconds(backend, seen, fmt, threads, repeats, others)
    units = {name: _costs(layer, runs[name], formats, measured) for name, layer in layers.items()}
    planned_ms = sum(_planned_ms(unit, layers, units) for unit in manifest.units)
    full_layers_ms = sum(costs[str(FULL_PRECISION)] for costs in units.values())
    scale, unfitted = _scale(action_ms, full_ms, planned_ms, full_layers_ms)
    return {
        "schema_version": 2,
        "kind": KIND,
        "target": manifest.target,
        "backend": manifest.backend,
        "policy_sha256": manifest.parents["policy"],
        "threads": threads,
        "versions": {manifest.backend: backend.version()},
        "scale": scale,
        "unfitted": unfitted,
        "fixed_ms": action_ms - scale * planned_ms,
        "units": {name: {fmt: scale * cost for fmt, cost in costs.items()} for name, costs in units.items()},
    }


def full_action_ms(result: Bench, target: Target) -> float | None:
    """A whole action of the 16-bit engine whose layers the same kernels multiply as the engine's own 16-bit ones; None
    where none was measured beside it."""
    mine = target.on(result.engine.backend).rule(FULL_PRECISION)
    for figures in result.references:
        whole = figures.average_bits == FULL_PRECISION.weight_bits
        if whole and target.on(figures.backend).rule(FULL_PRECISION) == mine:
            return figures.stages["action"].median_ms
    return None


def _scale(
    action_ms: float, full_ms: float | None, planned_layers_ms: float, full_layers_ms: float
) -> tuple[float, str | None]:
    """By how much two engines' actions differ over by how much their layers, timed alone, do; or 1, and why not."""
    if full_ms is None:
        return 1.0, "no 16-bit engine of the same kernels was measured beside it; name one with --against, too"
    actions_ms, layers_ms = full_ms - action_ms, full_layers_ms - planned_layers_ms
    differ = f"whole actions differ by {actions_ms:.3g} ms and their layers, timed alone, by {layers_ms:.3g} ms"
    if abs(layers_ms) < _ALIKE * action_ms:
        return 1.0, f"{differ}, which is too little to tell"
    scale = actions_ms / layers_ms
    if not 1 / _PLAUSIBLE < scale < _PLAUSIBLE:
        return 1.0, f"{differ}: other work disturbed them, or it is not layers that take the time"
    return scale, None


def runs_per_action(config: PolicyConfig, unnorm_key: str | None = None) -> dict[str, tuple[Runs, ...]]:
    """How often per action every layer runs, with a prompt of `PROMPT_TOKENS`.

    unnorm_key: of the statistics, which tell how many values an action has.
    """
    decided = config.stats(unnorm_key).action.dim * config.horizon
    return {unit.name: unit.runs(PROMPT_TOKENS, decided) for unit in live_units(empty_policy(config))}


def _costs(
    layer: Layer,
    runs: Sequence[Runs],
    formats: Sequence[Format],
    measured: Mapping[tuple[int, int, float, Format], float],
) -> dict[str, float]:
    return {
        str(fmt): sum(run.times * measured[layer.outputs, layer.inputs, run.tokens, fmt] for run in runs)
        for fmt in formats
    }


def _planned_ms(unit: UnitRecord, layers: Mapping[str, Layer], units: Mapping[str, Mapping[str, float]]) -> float:
    """Of a layer, or of one of its parts, in its planned format."""
    name = unit.name if unit.name in layers else unit.name.rpartition(".rows")[0]
    return units[name][unit.planned] * unit.outputs / layers[name].outputs


class _Others:
    """What an action reads between two passes of a layer: a policy's other weights, in float32."""

    def __init__(self, weights: int, threads: int) -> None:
        self._shares = np.array_split(np.ones(min(weights, _LARGEST_CACHE // 4), np.float32), threads)
        self._pool = ThreadPoolExecutor(threads)  # every core has a cache of its own

    def __enter__(self) -> "_Others":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def read(self) -> None:
        list(self._pool.map(np.sum, self._shares))


def _milliseconds(
    backend: Backend, seen: tuple[int, int, int], fmt: Format, threads: int, repeats: int, others: _Others
) -> float:
    """Of a layer of outputs and inputs on a number of tokens, its weights not in the cache and its input there.

    Several such layers, each with weights of its own, are one graph: a call costs as much as a small layer.
    """
    outputs, inputs, tokens = seen
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(outputs, inputs, generator=generator)
    copies = [f"y{index}" for index in range(max(1, min(_COPIES, _COPIED_WEIGHTS // (outputs * inputs))))]
    choice = parse_choice(str(fmt))  # how the codes were found does not change the time
    codes = None if choice.recipe is None else quantize(rows, choice)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        dialect = backend.dialect(parse_version(backend.version()))
        with GraphBuilder(path, dialect.float_type) as builder:
            for name in copies:
                layer = Layer(f"layer_{name}", "linear", f"layer_{name}", outputs, inputs, bias=False)
                weights = LayerWeights(layer, fmt, codes, rows if codes is None else None, None)
                builder.rename(dialect.linear(builder, "x", weights), name)
            infos = [
                helper.make_tensor_value_info(name, dialect.float_type, [1, "tokens", size])
                for name, size in (("x", inputs), *((name, outputs) for name in copies))
            ]
            builder.save(infos[:1], infos[1:])
        run = backend.open_layer(path, threads)
        x = {"x": torch.randn(1, tokens, inputs, generator=generator).numpy().astype(builder.float_dtype)}
        run(x)
        laps = []
        for _ in range(repeats):
            others.read()
            x["x"].sum()
            started = time.perf_counter()
            run(x)
            laps.append((time.perf_counter() - started) * 1e3 / len(copies))
    return float(np.median(laps))
