"""How long each layer takes per action in each legal format: the table that a latency budget is allocated from.

Layers of one shape and number of tokens are measured once. A layer's cost is one pass over the tokens it sees while the
prompt is read, plus one pass of a single token for each decode step.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
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
from vla_policy.core.formats import FULL_PRECISION, Format
from vla_policy.core.manifest import Manifest, UnitRecord
from vla_policy.core.policy_config import PolicyConfig

KIND = "cost_table"
PROMPT_TOKENS = 30


def cost_table(
    manifest: Manifest,
    formats: Sequence[Format],
    threads: int,
    action_ms: float,
    repeats: int = 7,
    unnorm_key: str | None = None,
) -> dict[str, Any]:
    """Median milliseconds per action, `{"units": {unit: {format: ms}}}`, measured on this machine.

    action_ms: a whole action of the manifest's engine; what its layers, measured as they were planned, do not account
    for is `fixed_ms`: attention, norms, embedding, preprocessing.

    Raises ArtefactError for a backend whose layers cannot be measured here.
    """
    backend = find_backend(manifest.backend)
    config = manifest.config
    layers, runs = layers_of(config), runs_per_action(config, unnorm_key)
    shapes = {(layer.outputs, layer.inputs, run.tokens) for name, layer in layers.items() for run in runs[name]}
    measured: dict[tuple[int, int, float, Format], float] = {}
    formats = list(dict.fromkeys([FULL_PRECISION, *formats, *(unit.choice.format for unit in manifest.units)]))
    jobs = [(*shape, fmt) for shape in sorted(shapes) for fmt in formats]
    for outputs, inputs, tokens, fmt in tqdm(jobs, desc="timing layers", unit="shape", disable=None):
        seen = (outputs, inputs, int(tokens))
        measured[outputs, inputs, tokens, fmt] = _milliseconds(backend, seen, fmt, threads, repeats)
    units = {name: _costs(layer, runs[name], formats, measured) for name, layer in layers.items()}
    return {
        "schema_version": 1,
        "kind": KIND,
        "target": manifest.target,
        "backend": manifest.backend,
        "policy_sha256": manifest.parents["policy"],
        "threads": threads,
        "versions": {manifest.backend: backend.version()},
        "fixed_ms": max(0.0, action_ms - sum(_planned_ms(unit, layers, units) for unit in manifest.units)),
        "units": units,
    }


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


def _milliseconds(backend: Backend, seen: tuple[int, int, int], fmt: Format, threads: int, repeats: int) -> float:
    """Of a layer of outputs and inputs on a number of tokens."""
    outputs, inputs, tokens = seen
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(outputs, inputs, generator=generator)
    layer = Layer("layer", "linear", "layer", outputs, inputs, bias=False)
    choice = parse_choice(str(fmt))  # how the codes were found does not change the time
    codes = None if choice.recipe is None else quantize(rows, choice)
    weights = LayerWeights(layer, fmt, codes, rows if codes is None else None, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        dialect = backend.dialect(parse_version(backend.version()))
        with GraphBuilder(path, dialect.float_type) as builder:
            builder.rename(dialect.linear(builder, "x", weights), "y")
            infos = [
                helper.make_tensor_value_info(name, dialect.float_type, [1, "tokens", size])
                for name, size in (("x", inputs), ("y", outputs))
            ]
            builder.save(infos[:1], infos[1:])
        run = backend.open_layer(path, threads)
        x = {"x": torch.randn(1, tokens, inputs, generator=generator).numpy().astype(builder.float_dtype)}
        run(x)
        laps = []
        for _ in range(repeats):
            started = time.perf_counter()
            run(x)
            laps.append((time.perf_counter() - started) * 1e3)
    return float(np.median(laps))
