"""pi0.5's graphs: `vision`, `prefix` with its keys and values, and one denoising `step`, on one copy of the weights.

What depends on the time alone is a table with a row per step: neither the time's network nor the norms' projections are
in the engine.
"""

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch
from onnx import TensorProto

from calibrator.families.pi05.model import EMBEDDING, PREFIX, PROJECTOR, VISION
from calibrator.families.pi05.time import EXPERT, adaptive_norms, modulations
from engine_build.families.base import Tensors
from engine_build.graph import fixed, gemma, llama, siglip
from engine_build.graph.context import GraphContext
from vla_policy.core.flow.config import FlowConfig
from vla_policy.core.program import COUNT, POSITION, ROWS, Call, Range, Sequences, TensorSpec

_TYPICAL_PROMPT = 48


def vision(graph: GraphContext, config: FlowConfig) -> Tensors:
    """Writes tower and projector."""
    return siglip.build(graph, config, VISION, PROJECTOR)


def prefix(graph: GraphContext, config: FlowConfig) -> Tensors:
    """Writes the prefix: [images][prompt], all of which see each other."""
    b, spec = graph.builder, config.text
    words = b.mul(llama.words(graph, "input_ids", f"{EMBEDDING}.weight"), b.scalar(spec.hidden_size**0.5))
    x, longest = b.concat(["patches", words], axis=1), config.num_patches + config.longest_prompt
    if graph.sequences is Sequences.FREE:
        places, mask = gemma.places(graph, b.constant(0, np.int64), gemma.length(graph, x, 1)), None
    else:
        places = fixed.first(graph, longest, x)
        mask = fixed.before(graph, places, COUNT)
    turn = gemma.rotary(graph, places, spec, longest)
    for number in range(spec.num_hidden_layers):
        name = f"{PREFIX}.layers.{number}"
        normed = gemma.norm(graph, x, f"{name}.input_layernorm")
        key, value = gemma.keys_values(graph, normed, f"{name}.self_attn", turn, spec)
        b.rename(key, f"key_{number}")
        b.rename(value, f"value_{number}")
        if number < spec.num_hidden_layers - 1:  # of the last block nothing else is ever read
            seen = [gemma.part(graph, key, value, mask)]
            x = b.add(x, gemma.attention(graph, normed, f"{name}.self_attn", turn, seen, spec))
            inner = gemma.norm(graph, x, f"{name}.post_attention_layernorm")
            x = b.add(x, gemma.mlp(graph, inner, f"{name}.mlp"))
    float_name = b.float_dtype.__name__
    inputs = [
        TensorSpec("input_ids", "int64", (1, "ids"), "token ids: the prompt from BOS on"),
        TensorSpec("patches", float_name, (1, config.num_patches, spec.hidden_size), "from the vision graph"),
    ]
    if graph.sequences is not Sequences.FREE:
        inputs.append(fixed.COUNT_SPEC)
    return inputs, gemma.cache_specs(graph, spec)


def step(graph: GraphContext, config: FlowConfig) -> Tensors:
    """Writes the expert: the velocity at the time of one step."""
    b, spec, rows = graph.builder, config.expert, config.horizon
    modulation = _modulation(graph, config)
    x = graph.linear(b.as_activations("actions"), "action_in_proj")
    free, longest = graph.sequences is Sequences.FREE, config.num_patches + config.longest_prompt
    if free:
        places = gemma.places(graph, gemma.length(graph, "key_0", 2), b.constant(rows, np.int64))
    else:
        places = b.add(b.constant(np.arange(rows), np.int64), POSITION)
        hidden = fixed.before(graph, fixed.first(graph, longest, "key_0", 2), POSITION)
    turn = gemma.rotary(graph, places, spec, longest + rows)
    for number in range(spec.num_hidden_layers):
        name = f"{EXPERT}.layers.{number}"
        scale, shift, gate = modulation[2 * number]
        normed = gemma.modulated(graph, x, scale, shift)
        own = gemma.keys_values(graph, normed, f"{name}.self_attn", turn, spec)
        before = (f"key_{number}", f"value_{number}")
        if free:
            key, value = (b.concat([past, mine], axis=2) for past, mine in zip(before, own, strict=True))
            seen = [gemma.part(graph, key, value, None)]
        else:
            seen = [gemma.part(graph, *before, hidden), gemma.part(graph, *own, None, rows)]
        attended = gemma.attention(graph, normed, f"{name}.self_attn", turn, seen, spec)
        x = b.add(x, b.mul(b.as_activations(gate), attended))
        scale, shift, gate = modulation[2 * number + 1]
        inner = gemma.mlp(graph, gemma.modulated(graph, x, scale, shift), f"{name}.mlp")
        x = b.add(x, b.mul(b.as_activations(gate), inner))
    scale, shift, _ = modulation[-1]
    velocity = graph.linear(gemma.modulated(graph, x, scale, shift), "action_out_proj")
    b.rename(b.cast(velocity, TensorProto.FLOAT) if b.float_type != TensorProto.FLOAT else velocity, "velocity")
    chunk = (1, rows, config.width)
    inputs = [
        TensorSpec("actions", graph.io_dtype.name, chunk, "the chunk so far, normalised; noise before the first step"),
        TensorSpec("step", "int64", (1,), f"number of the step, 0 to {config.num_inference_steps - 1}"),
        *gemma.cache_specs(graph, spec),
        *([] if free else [fixed.POSITION_SPEC]),
    ]
    return inputs, [TensorSpec("velocity", "float32", chunk, "noise minus actions, per unit of time")]


def _modulation(graph: GraphContext, config: FlowConfig) -> list[list[str]]:
    """Scale, shift and gate of every norm in the order of `adaptive_norms`, float32 [1, 1, width] each, at `step`."""
    b, norms, width = graph.builder, len(adaptive_norms(config)), config.expert.hidden_size
    times = torch.from_numpy(config.convention.times(config.num_inference_steps))
    # In float64, so that the float32 numbers are the same on every processor: engines are compared byte by byte.
    table = modulations(lambda name: graph.tensors.tensor(name).double(), times, config)
    name = b.tensor("step_table", table.flatten(1).float().numpy())
    row = b.node("Gather", [name, "step"], axis=0)
    parts = b.nodes("Split", [b.reshape(row, 1, 3 * norms, width)], 3 * norms, axis=1, num_outputs=3 * norms)
    return [parts[3 * number : 3 * number + 3] for number in range(norms)]


class Pi05:
    """The family."""

    graphs = MappingProxyType({"vision": vision, "prefix": prefix, "step": step})

    def program(self, config: FlowConfig, sequences: Sequences) -> dict[str, Call]:
        longest = config.longest_prompt
        typical = min(_TYPICAL_PROMPT, longest)
        ids, length = (Range.in_quarters(before, 1, typical, longest) for before in (0, config.num_patches))
        if sequences is Sequences.FREE:
            ids, length = replace(ids, steps=()), replace(length, steps=())
        names = gemma.cache_names(config.text)
        return {
            "vision": Call("vision", {}, {"patches": "patches"}),
            "prefix": Call(
                "prefix", {"ids": ids, ROWS: length}, dict(zip(names, names, strict=True))
            ),
            "step": Call("step", {ROWS: length}, {}),
        }


FAMILY = Pi05()
