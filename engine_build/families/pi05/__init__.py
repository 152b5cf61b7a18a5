"""pi0.5's and pi0's graphs: `vision`, `prefix` with its keys and values, one denoising `step`; one copy of the weights.

What depends on the time alone is a table with a row per step: pi0.5's time network and the norms' projections are not
in the engine.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from onnx import TensorProto

from calibrator.families.pi05.model import EMBEDDING, PREFIX, PROJECTOR, VISION
from calibrator.families.pi05.time import EXPERT, embedding, expert_norms, modulations
from engine_build.families.base import Tensors
from engine_build.graph import fixed, gemma, llama, siglip
from engine_build.graph.context import GraphContext
from vla_policy.core.families.pi05 import STATE
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
    b, spec, rows = graph.builder, config.expert, config.suffix
    norms = _adaptive_norms(graph, config) if config.adaptive else _norms(graph, config)
    x = _suffix(graph, config)
    own_mask = None if config.adaptive else _behind_state(graph, config)
    free, longest = graph.sequences is Sequences.FREE, config.num_patches + config.longest_prompt
    if free:
        places = gemma.places(graph, gemma.length(graph, "key_0", 2), b.constant(rows, np.int64))
    else:
        places = b.add(b.constant(np.arange(rows), np.int64), POSITION)
        hidden = fixed.before(graph, fixed.first(graph, longest, "key_0", 2), POSITION)
    turn = gemma.rotary(graph, places, spec, longest + rows)
    for number in range(spec.num_hidden_layers):
        name = f"{EXPERT}.layers.{number}"
        before_attention, before_mlp = norms[2 * number : 2 * number + 2]
        normed = before_attention.normed(x)
        own = gemma.keys_values(graph, normed, f"{name}.self_attn", turn, spec)
        before = (f"key_{number}", f"value_{number}")
        if free and own_mask is None:
            key, value = (b.concat([past, mine], axis=2) for past, mine in zip(before, own, strict=True))
            seen = [gemma.part(graph, key, value, None)]
        else:
            past = gemma.part(graph, *before, None if free else hidden)
            seen = [past, gemma.part(graph, *own, own_mask, rows)]
        attended = gemma.attention(graph, normed, f"{name}.self_attn", turn, seen, spec)
        x = b.add(x, before_attention.gated(attended))
        inner = gemma.mlp(graph, before_mlp.normed(x), f"{name}.mlp")
        x = b.add(x, before_mlp.gated(inner))
    if not config.adaptive:
        x = b.slice(x, 1, llama.LAST, 1)
    velocity = graph.linear(norms[-1].normed(x), "action_out_proj")
    b.rename(b.cast(velocity, TensorProto.FLOAT) if b.float_type != TensorProto.FLOAT else velocity, "velocity")
    chunk = (1, config.horizon, config.width)
    inputs = [
        TensorSpec("actions", graph.io_dtype.name, chunk, "the chunk so far, normalised; noise before the first step"),
        TensorSpec("step", "int64", (1,), f"number of the step, 0 to {config.num_inference_steps - 1}"),
        *gemma.cache_specs(graph, spec),
        *([] if free else [fixed.POSITION_SPEC]),
    ]
    if not config.adaptive:
        state = (1, 1, config.state_width)
        inputs.append(TensorSpec(STATE, graph.io_dtype.name, state, "the robot's, normalised, filled up with zeros"))
    return inputs, [TensorSpec("velocity", "float32", chunk, "noise minus actions, per unit of time")]


@dataclass(frozen=True)
class _Norm:
    """A norm of the expert: what it makes of x, and how what is computed from that enters the sum."""

    normed: Callable[[str], str]
    gated: Callable[[str], str]


def _adaptive_norms(graph: GraphContext, config: FlowConfig) -> list[_Norm]:
    """In the order of `expert_norms`, with scale, shift and gate, float32 [1, 1, width] each, of the time of `step`."""
    b, norms, width = graph.builder, len(expert_norms(config)), config.expert.hidden_size
    # In float64, so that the float32 numbers are the same on every processor: engines are compared byte by byte.
    table = modulations(lambda name: graph.tensors.tensor(name).double(), _times(config), config)
    row = b.reshape(_row(graph, table.flatten(1)), 1, 3 * norms, width)
    parts = b.nodes("Split", [row], 3 * norms, axis=1, num_outputs=3 * norms)

    def norm(scale: str, shift: str, gate: str) -> _Norm:
        return _Norm(
            lambda x: gemma.modulated(graph, x, scale, shift), lambda inner: b.mul(b.as_activations(gate), inner)
        )

    return [norm(*parts[3 * number : 3 * number + 3]) for number in range(norms)]


def _norms(graph: GraphContext, config: FlowConfig) -> list[_Norm]:
    """The same of norms that no time changes."""

    def norm(name: str) -> _Norm:
        return _Norm(lambda x: gemma.norm(graph, x, name), lambda inner: inner)

    return [norm(name) for name in expert_norms(config)]


def _suffix(graph: GraphContext, config: FlowConfig) -> str:
    """What enters the expert, [1, rows, width]."""
    b = graph.builder
    x = graph.linear(b.as_activations("actions"), "action_in_proj")
    if config.adaptive:
        return x
    time = b.reshape(b.as_activations(_row(graph, embedding(_times(config), config))), 1, 1, -1)
    times = b.node("Expand", [time, b.ints(1, config.horizon, config.expert.hidden_size)])
    joined = graph.linear(b.concat([x, times], axis=-1), "action_time_mlp_in")
    joined = graph.linear(b.mul(joined, b.node("Sigmoid", [joined])), "action_time_mlp_out")
    return b.concat([graph.linear(b.as_activations(STATE), "state_proj"), joined], axis=1)


def _behind_state(graph: GraphContext, config: FlowConfig) -> str:
    """The mask among the suffix's own rows, for every query head: the state's row sees no action."""
    b, spec, rows = graph.builder, config.expert, config.suffix
    mask = np.zeros((rows, rows), b.float_dtype)
    mask[0, 1:] = np.finfo(b.float_dtype).min
    heads = spec.num_attention_heads // spec.num_key_value_heads
    return b.tensor("behind_state", np.tile(mask, (heads, 1)))


def _times(config: FlowConfig) -> torch.Tensor:
    return torch.from_numpy(config.convention.times(config.num_inference_steps))


def _row(graph: GraphContext, table: torch.Tensor) -> str:
    """Of what depends on the time alone, [N, values], the row of `step`: float32 [1, values]."""
    b = graph.builder
    return b.node("Gather", [b.tensor("step_table", table.float().numpy()), "step"], axis=0)


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
