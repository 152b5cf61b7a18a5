"""Gemma's pieces for a prefix that is read once, and for an expert that attends its keys and values."""

from collections.abc import Sequence

import numpy as np

from engine_build.graph import fixed, llama
from engine_build.graph.context import GraphContext
from engine_build.weights import as_float32
from vla_policy.core.flow.config import RMS_NORM_EPS, ROPE_THETA, GemmaSpec
from vla_policy.core.program import ROWS, TensorSpec


def cache_names(spec: GemmaSpec) -> list[str]:
    """Keys and values of every layer, as the prefix gives and a step takes them."""
    return [f"{part}_{number}" for number in range(spec.num_hidden_layers) for part in ("key", "value")]


def cache_specs(graph: GraphContext, spec: GemmaSpec) -> list[TensorSpec]:
    """The cache's tensors."""
    shape = (1, spec.num_key_value_heads, ROWS, spec.head_dim)
    dtype = graph.builder.float_dtype.__name__
    return [TensorSpec(name, dtype, shape, "keys or values of a layer of the prefix") for name in cache_names(spec)]


def rotary(graph: GraphContext, places: str, spec: GemmaSpec, longest: int) -> llama.Rotation:
    """Of rows at `places`, int64 [T], which `longest` bounds."""
    return llama.rotary(graph, places, spec.head_dim, ROPE_THETA, longest)


def norm(graph: GraphContext, x: str, name: str) -> str:
    """Gemma's RMSNorm: times 1 + weight."""
    b = graph.builder
    weight = b.tensor(f"{name}.weight", 1 + as_float32(graph.tensors.tensor(f"{name}.weight")), np.float32)
    return b.as_activations(b.mul(llama.normalised(graph, x, RMS_NORM_EPS), weight))


def modulated(graph: GraphContext, x: str, scale: str, shift: str) -> str:
    """adaRMS: times 1 + scale, plus shift, float32 [1, 1, width] each."""
    b = graph.builder
    scaled = b.mul(llama.normalised(graph, x, RMS_NORM_EPS), b.add(b.constant(1, np.float32), scale))
    return b.as_activations(b.add(scaled, shift))


def keys_values(graph: GraphContext, x: str, name: str, turn: llama.Rotation, spec: GemmaSpec) -> tuple[str, str]:
    """[1, kv heads, T, d] each."""
    key = _heads(graph, graph.linear(x, f"{name}.k_proj"), spec.num_key_value_heads, spec)
    return llama.rotate(graph, key, turn), _heads(
        graph, graph.linear(x, f"{name}.v_proj"), spec.num_key_value_heads, spec
    )


def attention(
    graph: GraphContext, x: str, name: str, turn: llama.Rotation, parts: Sequence[fixed.Part], spec: GemmaSpec
) -> str:
    """Every position of `x` attends all keys that are not hidden."""
    b = graph.builder
    query = llama.rotate(graph, _heads(graph, graph.linear(x, f"{name}.q_proj"), spec.num_attention_heads, spec), turn)
    apart = b.transpose(fixed.attend(graph, query, parts, spec), 0, 2, 1, 3)
    return graph.linear(b.reshape(apart, 1, -1, spec.query_width), f"{name}.o_proj")


def part(graph: GraphContext, key: str, value: str, mask: str | None, length: int | None = None) -> fixed.Part:
    """Keys and values as `keys_values` gives them, to be attended."""
    return fixed.Part(graph.builder.transpose(key, 0, 1, 3, 2), value, mask, length)


def mlp(graph: GraphContext, x: str, name: str) -> str:
    """down(gelu(gate) up)."""
    b = graph.builder
    gate = b.node("Gelu", [graph.linear(x, f"{name}.gate_proj")], approximate="tanh")
    return graph.linear(b.mul(gate, graph.linear(x, f"{name}.up_proj")), f"{name}.down_proj")


def length(graph: GraphContext, x: str, axis: int) -> str:
    """int64, a scalar: the size of an axis."""
    b = graph.builder
    return b.node("Squeeze", [b.node("Shape", [x], start=axis, end=axis + 1), b.ints(0)])


def places(graph: GraphContext, first: str, count: str) -> str:
    """int64 [count] from `first` on."""
    b = graph.builder
    return b.node("Range", [first, b.add(first, count), b.constant(1, np.int64)])


def _heads(graph: GraphContext, x: str, heads: int, spec: GemmaSpec) -> str:
    b = graph.builder
    return b.transpose(b.reshape(x, 1, -1, heads, spec.head_dim), 0, 2, 1, 3)


