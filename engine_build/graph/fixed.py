"""Sequences of fixed size: rows that are filled up, and a cache of fixed length that stays where it is.

Rows of filling come last. They are behind every row that counts, so that a causal mask hides them, and what they leave
in the cache is overwritten by the next rows, or hidden until then. See `Sequences` for the two forms of the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine_build.graph.context import GraphContext
from vla_policy.core.program import COUNT, POSITION, Sequences, TensorSpec

COUNT_SPEC = TensorSpec(COUNT, "int64", (1,), "rows of this call that are no filling")
POSITION_SPEC = TensorSpec(POSITION, "int64", (1,), "rows in the cache before this call")


class Heads(Protocol):
    """Of an attention; a configuration's own numbers."""

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True)
class Part:
    """Some of the keys [1, kv heads, d, S] and values [1, kv heads, S, d] that are attended.

    mask: [S] or, of all query heads that share a key, [T ..., S]; None where all are seen. length: S where it is known.
    """

    keys: str
    values: str
    mask: str | None
    length: int | None = None


@dataclass(frozen=True)
class Cached:
    """How the rows of a call see each other and the cache.

    rotation: of queries and keys, see `llama.rotate`. masks: of the whole cache, where it holds the new rows already,
    else of the cache as it was and of the new rows. length: of the cache.
    """

    rotation: tuple[str, ...]
    masks: tuple[str, ...]
    length: int


def first(graph: GraphContext, longest: int, rows: str, axis: int = 1) -> str:
    """int64 [T]: 0, 1, ... of `rows` with T places on that axis; `longest` bounds T."""
    b = graph.builder
    count = b.node("Shape", [rows], start=axis, end=axis + 1)
    return b.node("Slice", [b.constant(np.arange(longest), np.int64), b.ints(0), count, b.ints(0)])


def mask(graph: GraphContext, seen: str) -> str:
    """Zero where a key is seen, the lowest number elsewhere."""
    b = graph.builder
    return b.node("Where", [seen, b.scalar(0.0), b.scalar(float(np.finfo(b.float_dtype).min))])


def before(graph: GraphContext, keys: str, end: str) -> str:
    """The mask of `keys`, int64 [S], that are below `end`, int64 [1] or [T, 1]."""
    return mask(graph, graph.builder.node("Less", [keys, end]))


def causal(graph: GraphContext, keys: str, places: str) -> str:
    """The mask [T, S] of `keys` [S] for rows at `places` [T]."""
    b = graph.builder
    return mask(graph, b.node("LessOrEqual", [keys, b.node("Unsqueeze", [places, b.ints(1)])]))


def with_patches(graph: GraphContext, words: str, places: str, begin: int, count: int) -> str:
    """`words` [1, T, hidden], with `patches` [1, count, hidden] for the rows whose places [T] are `begin` and on."""
    b = graph.builder
    number = b.node("Sub", [places, b.ints(begin)])
    below, above = b.node("Less", [number, b.ints(0)]), b.node("GreaterOrEqual", [number, b.ints(count)])
    inside = b.node("Min", [b.node("Max", [number, b.ints(0)]), b.ints(count - 1)])
    column = b.node("Unsqueeze", [b.node("Or", [below, above]), b.ints(1)])
    return b.node("Where", [column, words, b.node("Gather", ["patches", inside], axis=1)])


def cache_masks(graph: GraphContext, length: int, rows: str, places: str, heads: Heads) -> tuple[str, ...]:
    """Those of `Cached`, for rows [T] at `places` [T]."""
    b, repeats = graph.builder, heads.num_attention_heads // heads.num_key_value_heads
    keys = b.constant(np.arange(length), np.int64)

    def repeated(value: str) -> str:
        return value if repeats == 1 else b.node("Tile", [value, b.ints(repeats, 1)])

    if graph.sequences is Sequences.UPDATED:
        return (repeated(causal(graph, keys, places)),)
    return before(graph, keys, POSITION), repeated(causal(graph, rows, rows))


def cached_parts(graph: GraphContext, seen: Cached, key: str, value: str, index: int) -> list[Part]:
    """What a layer attends, and how it leaves its new keys and values [1, kv heads, T, d]."""
    b = graph.builder
    if graph.sequences is Sequences.UPDATED:
        key, value = (
            b.node("TensorScatter", [f"past_{part}_{index}", new, POSITION], f"present_{part}_{index}", axis=2)
            for part, new in (("key", key), ("value", value))
        )
        return [Part(b.transpose(key, 0, 1, 3, 2), value, seen.masks[0])]
    for part, new in (("key", key), ("value", value)):
        b.node("Transpose", [new], f"new_{part}_{index}", perm=[0, 2, 1, 3])
    past = Part(
        b.transpose(f"past_key_{index}", 0, 2, 3, 1), b.transpose(f"past_value_{index}", 0, 2, 1, 3), seen.masks[0],
        seen.length,
    )  # fmt: skip
    return [past, Part(b.transpose(key, 0, 1, 3, 2), value, seen.masks[1])]


def attend(graph: GraphContext, query: str, parts: Sequence[Part], heads: Heads) -> str:
    """[1, heads, T, d] of queries of that shape: one softmax over the keys of one or two parts, which are not joined.

    Heads that share keys are further rows of one head, for which a mask [T, S] must be repeated.
    """
    b = graph.builder
    query = b.reshape(b.mul(query, b.scalar(heads.head_dim**-0.5)), 1, heads.num_key_value_heads, -1, heads.head_dim)
    scores = [b.matmul(query, part.keys) for part in parts]
    scores = [
        value if part.mask is None else b.add(value, part.mask) for value, part in zip(scores, parts, strict=True)
    ]
    weights = [b.node("Softmax", [scores[0] if len(parts) == 1 else b.concat(scores, axis=-1)], axis=-1)]
    if len(parts) == 2:
        end = parts[0].length if parts[1].length is None else -parts[1].length
        assert end is not None
        weights = [b.slice(weights[0], 0, end, -1), b.slice(weights[0], end, np.iinfo(np.int64).max, -1)]
    mixed = [b.matmul(weight, part.values) for weight, part in zip(weights, parts, strict=True)]
    together = mixed[0] if len(mixed) == 1 else b.add(*mixed)
    return b.reshape(together, 1, heads.num_attention_heads, -1, heads.head_dim)
