"""A Llama decoder's pieces: embedding, rotary positions, norms and blocks, with or without a key/value cache."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from engine_build.graph import fixed
from engine_build.graph.builder import MICROSOFT
from engine_build.graph.context import GraphContext
from vla_policy.core.prismatic.config import TextSpec
from vla_policy.core.program import POSITION, Sequences, TensorSpec

LAST = np.iinfo(np.int64).max
"""As the end of a slice: up to what is there."""


def cache_names(text: TextSpec, state: str) -> list[str]:
    """The cache's tensors; `state` is `past` for the inputs, `present` for the outputs."""
    return [f"{state}_{part}_{index}" for index in range(text.num_hidden_layers) for part in ("key", "value")]


def cache_specs(graph: GraphContext, text: TextSpec, state: str, length: int | str) -> list[TensorSpec]:
    """The cache's tensors as inputs or outputs; `length` is their size or names their free dimension."""
    dtype, heads = graph.builder.float_dtype.__name__, text.num_key_value_heads
    rows_first = graph.sequences is Sequences.APPENDED  # so that a row is in one piece
    shape = (1, length, heads, text.head_dim) if rows_first else (1, heads, length, text.head_dim)
    return [TensorSpec(name, dtype, shape, "cached keys or values of a layer") for name in cache_names(text, state)]


_EMBEDDING = "language_model.model.embed_tokens.weight"


def words(graph: GraphContext, ids: str, table: str = _EMBEDDING) -> str:
    """Embeddings [1, L, hidden] of ids [1, L]. table: its tensor's name."""
    b = graph.builder
    values = graph.tensors.tensor(table).to(torch.bfloat16)
    content = values.contiguous().view(torch.uint8).numpy().tobytes()
    name = b.raw(table, TensorProto.BFLOAT16, tuple(values.shape), content)
    return b.cast(b.node("Gather", [name, ids], axis=0), b.float_type)


Rotation = tuple[str, ...]
"""Of rows: rotary cosine and sine [T, head_dim]; or tables of both [places, head_dim / 2], and the places [1, T]."""


@dataclass(frozen=True)
class Bidirectional:
    """Of a pass in which every position sees every other. mask: [1, T], hides filling; None where there is none."""

    rotation: Rotation
    mask: str | None = None


@dataclass(frozen=True)
class Causal:
    """Of a pass that reads and extends a growing cache. mask: [T, total]."""

    rotation: Rotation
    mask: str


@dataclass(frozen=True)
class Grouped:
    """The same for GroupQueryAttention, which masks and rotates itself.

    last: int32 [1], the place of this call's last input. total: int32, the sequence's length after this call. cosine,
    sine: [longest sequence, head_dim / 2].
    """

    last: str
    total: str
    cosine: str
    sine: str


@dataclass(frozen=True)
class Own:
    """The same for CausalAttention, which reads the cache's length off it. domain: the operator's. cosine, sine: as of
    `Grouped`."""

    domain: str
    cosine: str
    sine: str


_HEAD_GRAIN = 16
"""GroupQueryAttention and CausalAttention take heads of a multiple of so many values."""


Seen = Bidirectional | Causal | Grouped | Own | fixed.Cached


def causal(graph: GraphContext, x: str, text: TextSpec, longest: int) -> Causal | Grouped | Own:
    """How the inputs `x` [1, T, hidden] of this call see each other and the cache. longest: sequence there will be."""
    if not graph.fused or text.head_dim % _HEAD_GRAIN:
        places, total = positions(graph, x)
        rotation = rotary(graph, places, text.head_dim, text.rope_theta, longest)
        return Causal(rotation, causal_mask(graph, places, total))
    b = graph.builder
    cosine, sine = _tables(graph, text.head_dim, text.rope_theta, longest, np.float32)
    if graph.own_attention is not None:
        return Own(graph.own_attention, cosine, sine)
    _, total = positions(graph, x)
    length = b.cast(total, TensorProto.INT32)
    last = b.node("Sub", [length, b.constant(1, np.int32)])
    return Grouped(b.node("Unsqueeze", [last, b.ints(0)]), length, cosine, sine)


def positions(graph: GraphContext, x: str) -> tuple[str, str]:
    """int64 [T], places of this call's inputs in the whole sequence, and the sequence's length after this call."""
    b = graph.builder
    past = b.node("Squeeze", [b.node("Shape", ["past_key_0"], start=2, end=3), b.ints(0)])
    count = b.node("Squeeze", [b.node("Shape", [x], start=1, end=2), b.ints(0)])
    total = b.add(past, count)
    return b.node("Range", [past, total, b.constant(1, np.int64)]), total


def cached(graph: GraphContext, rows: str, text: TextSpec, longest: int) -> tuple[fixed.Cached, str]:
    """The same with a cache of fixed length, `longest`, and the places int64 [T] of `rows` [1, T]."""
    b = graph.builder
    numbers = fixed.first(graph, longest, rows)
    places = b.add(numbers, POSITION)
    rotation = rotary(graph, places, text.head_dim, text.rope_theta, longest)
    return fixed.Cached(rotation, fixed.cache_masks(graph, longest, numbers, places, text), longest), places


def rotary(graph: GraphContext, positions: str, head_dim: int, theta: float, longest: int) -> Rotation:
    """Of rows at `positions` int64 [T]; computed in float32 whatever the activations are. longest: bounds them."""
    b = graph.builder
    if graph.sequences is Sequences.UPDATED:
        return *_tables(graph, head_dim, theta, longest, b.float_dtype), b.node("Unsqueeze", [positions, b.ints(0)])
    column = b.node("Unsqueeze", [b.cast(positions, TensorProto.FLOAT), b.ints(1)])
    angles = b.mul(column, b.constant(_frequencies(head_dim, theta)[None], np.float32))
    both = b.concat([angles, angles], axis=1)
    cosine, sine = b.node("Cos", [both]), b.node("Sin", [both])
    if b.float_type != TensorProto.FLOAT:
        cosine, sine = b.cast(cosine, b.float_type), b.cast(sine, b.float_type)
    return cosine, sine


def _tables(graph: GraphContext, head_dim: int, theta: float, longest: int, dtype: Any) -> tuple[str, str]:
    """Cosine and sine [longest, head_dim / 2] of every place."""
    angles = np.arange(longest, dtype=np.float32)[:, None] * _frequencies(head_dim, theta)[None]
    wide, write = angles.astype(np.float64), graph.builder.tensor
    return write("rotary.cosine", np.cos(wide), dtype), write("rotary.sine", np.sin(wide), dtype)


def _frequencies(head_dim: int, theta: float) -> np.ndarray:
    """float32 [head_dim / 2], in float64 before: so they are the same on every processor, and engines are compared
    byte by byte."""
    exponents = np.arange(0, head_dim, 2) / head_dim
    frequencies: np.ndarray = (1.0 / np.power(theta, exponents)).astype(np.float32)
    return frequencies


def causal_mask(graph: GraphContext, positions: str, total: str) -> str:
    """[T, total]: zero where a key may be seen, the lowest number elsewhere."""
    b = graph.builder
    keys = b.node("Range", [b.constant(0, np.int64), total, b.constant(1, np.int64)])
    seen = b.node("LessOrEqual", [keys, b.node("Unsqueeze", [positions, b.ints(1)])])
    return b.node("Where", [seen, b.scalar(0.0), b.scalar(float(np.finfo(b.float_dtype).min))])


def normalised(graph: GraphContext, x: str, eps: float) -> str:
    """x / sqrt(mean(x^2) + eps), in float32: squares of float16 activations would overflow."""
    b = graph.builder
    wide = b.cast(x, TensorProto.FLOAT) if b.float_type != TensorProto.FLOAT else x
    mean = b.node("ReduceMean", [b.mul(wide, wide), b.ints(-1)], keepdims=1)
    return b.node("Div", [wide, b.node("Sqrt", [b.add(mean, b.constant(eps, np.float32))])])


def rms_norm(graph: GraphContext, x: str, name: str, eps: float) -> str:
    """`normalised` times the norm's weight."""
    b = graph.builder
    if graph.fused:
        weight = graph.parameter(name, np.float32)
        return b.node("SimplifiedLayerNormalization", [x, weight], f"{name}.norm", axis=-1, epsilon=eps)
    return b.as_activations(b.mul(normalised(graph, x, eps), graph.parameter(name, np.float32)))


def block(graph: GraphContext, x: str, seen: Seen, text: TextSpec, index: int) -> str:
    """One block. seen: how positions see each other, the same for all blocks."""
    b, name = graph.builder, f"language_model.model.layers.{index}"
    attended = _attention(graph, rms_norm(graph, x, f"{name}.input_layernorm.weight", text.rms_norm_eps),
                          seen, text, index)  # fmt: skip
    x = b.add(x, attended)
    normed = rms_norm(graph, x, f"{name}.post_attention_layernorm.weight", text.rms_norm_eps)
    gate = graph.linear(normed, f"{name}.mlp.gate_proj")
    gated = b.mul(_silu(graph, gate, name), graph.linear(normed, f"{name}.mlp.up_proj"))
    return b.add(x, graph.linear(gated, f"{name}.mlp.down_proj"))


def _silu(graph: GraphContext, x: str, name: str) -> str:
    """x sigmoid(x)."""
    b = graph.builder
    if graph.fused:
        return b.microsoft("QuickGelu", [x], f"{name}.mlp.silu", alpha=1.0)
    return b.mul(x, b.node("Sigmoid", [x]))


def _attention(graph: GraphContext, x: str, seen: Seen, text: TextSpec, index: int) -> str:
    b, name = graph.builder, f"language_model.model.layers.{index}.self_attn"
    parts = [graph.linear(x, f"{name}.{part}") for part in ("q_proj", "k_proj", "v_proj")]
    if isinstance(seen, Grouped | Own):
        return graph.linear(_grouped(graph, parts, seen, text, index), f"{name}.o_proj")
    query = rotate(graph, _heads(graph, parts[0], text.num_attention_heads, text), seen.rotation)
    key = rotate(graph, _heads(graph, parts[1], text.num_key_value_heads, text), seen.rotation)
    value = _heads(graph, parts[2], text.num_key_value_heads, text)
    if graph.sequences is not Sequences.FREE:
        mixed = fixed.attend(graph, query, _parts(graph, seen, key, value, index), text)
        return _out(graph, mixed, f"{name}.o_proj", text)
    if isinstance(seen, Causal):
        key = b.concat([f"past_key_{index}", key], axis=2, name=f"present_key_{index}")
        value = b.concat([f"past_value_{index}", value], axis=2, name=f"present_value_{index}")
    key, value = _shared(graph, key, text), _shared(graph, value, text)
    scores = b.matmul(b.mul(query, b.scalar(text.head_dim**-0.5)), b.transpose(key, 0, 1, 3, 2))
    if isinstance(seen, Causal):
        scores = b.add(scores, seen.mask)
    return _out(graph, b.matmul(b.node("Softmax", [scores], axis=-1), value), f"{name}.o_proj", text)


def _parts(graph: GraphContext, seen: Seen, key: str, value: str, index: int) -> list[fixed.Part]:
    if isinstance(seen, fixed.Cached):
        return fixed.cached_parts(graph, seen, key, value, index)
    assert isinstance(seen, Bidirectional)
    return [fixed.Part(graph.builder.transpose(key, 0, 1, 3, 2), value, seen.mask)]


def _out(graph: GraphContext, mixed: str, name: str, text: TextSpec) -> str:
    """What comes of `mixed` [1, heads, T, d]."""
    b = graph.builder
    joined = b.reshape(b.transpose(mixed, 0, 2, 1, 3), 1, -1, text.num_attention_heads * text.head_dim)
    return graph.linear(joined, name)


def _grouped(graph: GraphContext, parts: list[str], seen: Grouped | Own, text: TextSpec, index: int) -> str:
    values = [*parts, f"past_key_{index}", f"past_value_{index}"]
    results = [f"attention_{index}", f"present_key_{index}", f"present_value_{index}"]
    heads = {"num_heads": text.num_attention_heads, "kv_num_heads": text.num_key_value_heads}
    if isinstance(seen, Own):
        inputs = [*values, seen.cosine, seen.sine]
        return graph.builder.nodes("CausalAttention", inputs, results, f"attention_{index}", seen.domain, **heads)[0]
    inputs = [*values, seen.last, seen.total, seen.cosine, seen.sine]
    return graph.builder.nodes(
        "GroupQueryAttention", inputs, results, f"attention_{index}", MICROSOFT, do_rotary=1, **heads
    )[0]


def _heads(graph: GraphContext, x: str, heads: int, text: TextSpec) -> str:
    b = graph.builder
    return b.transpose(b.reshape(x, 1, -1, heads, text.head_dim), 0, 2, 1, 3)


def _shared(graph: GraphContext, x: str, text: TextSpec) -> str:
    """Repeats key/value heads [1, kv, T, d] for the query heads that share them."""
    repeats = text.num_attention_heads // text.num_key_value_heads
    if repeats == 1:
        return x
    b = graph.builder
    tiled = b.node("Tile", [b.node("Unsqueeze", [x, b.ints(2)]), b.ints(1, 1, repeats, 1, 1)])
    return b.reshape(tiled, 1, text.num_attention_heads, -1, text.head_dim)


def rotate(graph: GraphContext, x: str, rotation: Rotation) -> str:
    """Rotary position embedding of [1, heads, T, d]: x cos + (-x2, x1) sin, halves as in Llama."""
    b = graph.builder
    if len(rotation) == 3:
        return b.node("RotaryEmbedding", [x, *rotation])
    first, second = b.nodes("Split", [x], 2, axis=-1, num_outputs=2)
    turned = b.concat([b.node("Neg", [second]), first], axis=-1)
    return b.add(b.mul(x, rotation[0]), b.mul(turned, rotation[1]))
