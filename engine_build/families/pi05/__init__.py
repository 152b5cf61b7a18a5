"""pi0.5's graphs: `vision`, `prefix` with its keys and values, and one denoising `step`, on one copy of the weights.

What depends on the time alone is a table with a row per step: neither the time's network nor the norms' projections are
in the engine.
"""

from types import MappingProxyType

import numpy as np
import torch
from onnx import TensorProto

from calibrator.families.pi05.model import EMBEDDING, PREFIX, PROJECTOR, VISION
from calibrator.families.pi05.time import EXPERT, adaptive_norms, modulations
from engine_build.families.base import Tensors
from engine_build.graph import gemma, llama, siglip
from engine_build.graph.context import GraphContext
from vla_policy.core.flow.config import FlowConfig
from vla_policy.core.program import Call, Range, TensorSpec

_TYPICAL_PROMPT = 48


def vision(graph: GraphContext, config: FlowConfig) -> Tensors:
    """Writes tower and projector."""
    return siglip.build(graph, config, VISION, PROJECTOR)


def prefix(graph: GraphContext, config: FlowConfig) -> Tensors:
    """Writes the prefix: [images][prompt], all of which see each other."""
    b, spec = graph.builder, config.text
    words = b.mul(llama.words(graph, "input_ids", f"{EMBEDDING}.weight"), b.scalar(spec.hidden_size**0.5))
    x = b.concat(["patches", words], axis=1)
    turn = gemma.rotary(graph, gemma.places(graph, b.constant(0, np.int64), gemma.length(graph, x, 1)), spec)
    for number in range(spec.num_hidden_layers):
        name = f"{PREFIX}.layers.{number}"
        normed = gemma.norm(graph, x, f"{name}.input_layernorm")
        key, value = gemma.keys_values(graph, normed, f"{name}.self_attn", turn, spec)
        b.rename(key, f"key_{number}")
        b.rename(value, f"value_{number}")
        if number < spec.num_hidden_layers - 1:  # of the last block nothing else is ever read
            x = b.add(x, gemma.attention(graph, normed, f"{name}.self_attn", turn, key, value, spec))
            inner = gemma.norm(graph, x, f"{name}.post_attention_layernorm")
            x = b.add(x, gemma.mlp(graph, inner, f"{name}.mlp"))
    float_name = b.float_dtype.__name__
    inputs = [
        TensorSpec("input_ids", "int64", (1, "ids"), "token ids: the prompt from BOS on"),
        TensorSpec("patches", float_name, (1, config.num_patches, spec.hidden_size), "from the vision graph"),
    ]
    return inputs, gemma.cache_specs(graph, spec)


def step(graph: GraphContext, config: FlowConfig) -> Tensors:
    """Writes the expert: the velocity at the time of one step."""
    b, spec, rows = graph.builder, config.expert, config.horizon
    modulation = _modulation(graph, config)
    x = graph.linear(b.as_activations("actions"), "action_in_proj")
    places = gemma.places(graph, gemma.length(graph, "key_0", 2), b.constant(rows, np.int64))
    turn = gemma.rotary(graph, places, spec)
    for number in range(spec.num_hidden_layers):
        name = f"{EXPERT}.layers.{number}"
        scale, shift, gate = modulation[2 * number]
        normed = gemma.modulated(graph, x, scale, shift)
        own = gemma.keys_values(graph, normed, f"{name}.self_attn", turn, spec)
        key, value = (
            b.concat([f"{part}_{number}", mine], axis=2) for part, mine in zip(("key", "value"), own, strict=True)
        )
        attended = gemma.attention(graph, normed, f"{name}.self_attn", turn, key, value, spec)
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

    def program(self, config: FlowConfig) -> dict[str, Call]:
        count, longest = config.num_patches, config.longest_prompt
        typical = min(_TYPICAL_PROMPT, longest)
        length = Range(count + 1, count + typical, count + longest)
        names = gemma.cache_names(config.text)
        return {
            "vision": Call("vision", {}, {"patches": "patches"}),
            "prefix": Call(
                "prefix", {"ids": Range(1, typical, longest), "prefix": length}, dict(zip(names, names, strict=True))
            ),
            "step": Call("step", {"prefix": length}, {}),
        }


FAMILY = Pi05()
