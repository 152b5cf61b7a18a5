"""The Llama decoder.

OpenVLA's has a key/value cache: prefill and decode step are one graph on one copy of the weights. The input embeddings
are [first id][patches][other ids]. Prefill passes BOS, P patches and the prompt; a decode step passes one id and zero
patches. Position and causal mask follow from the length of the cache.

OpenVLA-OFT's decides in one pass over [BOS][patches][state][prompt][empty actions][EOS], without cache or mask, and
ends with the head that reads the actions.
"""

import numpy as np
import torch
from onnx import TensorProto

from calibrator.families.openvla_oft.model import EOS, HEAD_BLOCKS
from engine_build.graph.context import GraphContext
from vla_policy.core.manifest import TensorSpec
from vla_policy.core.policy_config import PolicyConfig, TextSpec

_LAST = np.iinfo(np.int64).max
_LAYER_NORM_EPS = 1e-5


def build(graph: GraphContext, config: PolicyConfig) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Writes the graph; returns its inputs and outputs."""
    if config.chunk is not None:
        return _build_chunk(graph, config, config.chunk)
    b, text = graph.builder, config.text
    words = _words(graph, "input_ids")
    x = b.concat([b.slice(words, 0, 1, 1), "patches", b.slice(words, 1, _LAST, 1)], axis=1)
    positions, total = _positions(graph, x)
    rotation, mask = _rotation(graph, positions, text), _causal_mask(graph, positions, total)
    for index in range(text.num_hidden_layers):
        x = _layer(graph, x, rotation, mask, text, index)
    last = _rms_norm(graph, b.slice(x, -1, _LAST, 1), "language_model.model.norm.weight", text.rms_norm_eps)
    logits = b.reshape(graph.linear(last, "language_model.lm_head"), 1, text.vocab_size)
    b.rename(b.cast(logits, TensorProto.FLOAT) if b.float_type != TensorProto.FLOAT else logits, "logits")
    return _inputs(graph, config), _outputs(graph, config)


def _build_chunk(graph: GraphContext, config: PolicyConfig, chunk: int) -> tuple[list[TensorSpec], list[TensorSpec]]:
    b, text, values = graph.builder, config.text, chunk * config.action_dim
    ids = b.concat(["input_ids", b.constant([[EOS]], np.int64)], axis=1)
    words = _words(graph, ids)
    state = [_state(graph, config)] if config.use_proprio else []
    empty = b.tensor("empty_actions", np.zeros((1, values, text.hidden_size), b.float_dtype))
    first, prompt, end = (b.slice(words, *ends, 1) for ends in ((0, 1), (1, -1), (-1, _LAST)))
    x = b.concat([first, "patches", *state, prompt, empty, end], axis=1)
    length = b.node("Squeeze", [b.node("Shape", [x], start=1, end=2), b.ints(0)])
    places = b.node("Range", [b.constant(0, np.int64), length, b.constant(1, np.int64)])
    rotation = _rotation(graph, places, text)
    for index in range(text.num_hidden_layers):
        x = _layer(graph, x, rotation, None, text, index)
    x = _rms_norm(graph, b.slice(x, -values - 2, -2, 1), "language_model.model.norm.weight", text.rms_norm_eps)
    x = _head(graph, b.reshape(x, 1, chunk, config.action_dim * text.hidden_size))
    b.rename(b.cast(x, TensorProto.FLOAT) if b.float_type != TensorProto.FLOAT else x, "actions")
    float_name = b.float_dtype.__name__
    inputs = [
        TensorSpec("input_ids", "int64", (1, "ids"), "token ids: the prompt from BOS on"),
        TensorSpec("patches", float_name, (1, config.num_patches, text.hidden_size), "from the vision graph"),
    ]
    if config.use_proprio:
        inputs.append(TensorSpec("state", float_name, (1, config.state_dim), "the robot's, normalised to [-1, 1]"))
    actions = TensorSpec("actions", "float32", (1, chunk, config.action_dim), "of the next control steps, normalised")
    return inputs, [actions]


def _state(graph: GraphContext, config: PolicyConfig) -> str:
    """The robot's state as one embedding [1, 1, hidden]."""
    b = graph.builder
    x = b.reshape("state", 1, 1, config.state_dim)
    x = b.node("Gelu", [graph.linear(x, "proprio_projector.fc1")])
    return graph.linear(x, "proprio_projector.fc2")


def _head(graph: GraphContext, x: str) -> str:
    """The L1 head: [1, H, K hidden] -> [1, H, K]."""
    b, name = graph.builder, "action_head.model"
    x = b.node("Relu", [graph.linear(graph.layer_norm(x, f"{name}.layer_norm1", _LAYER_NORM_EPS), f"{name}.fc1")])
    for index in range(HEAD_BLOCKS):
        block = f"{name}.mlp_resnet_blocks.{index}.ffn"
        inner = graph.linear(graph.layer_norm(x, f"{block}.0", _LAYER_NORM_EPS), f"{block}.1")
        x = b.add(x, b.node("Relu", [inner]))
    return graph.linear(graph.layer_norm(x, f"{name}.layer_norm2", _LAYER_NORM_EPS), f"{name}.fc2")


def _cache_specs(graph: GraphContext, text: TextSpec, state: str, length: str) -> list[TensorSpec]:
    shape = (1, text.num_key_value_heads, length, text.head_dim)
    return [
        TensorSpec(
            f"{state}_{part}_{index}", graph.builder.float_dtype.__name__, shape, f"cached {part}s, layer {index}"
        )
        for index in range(text.num_hidden_layers)
        for part in ("key", "value")
    ]


def _inputs(graph: GraphContext, config: PolicyConfig) -> list[TensorSpec]:
    float_name = graph.builder.float_dtype.__name__
    return [
        TensorSpec("input_ids", "int64", (1, "ids"), "token ids: the prompt from BOS on, or one action token"),
        TensorSpec(
            "patches",
            float_name,
            (1, "patches", config.text.hidden_size),
            f"from the vision graph: {config.num_patches} patches to prefill, none to decode",
        ),
        *_cache_specs(graph, config.text, "past", "past"),
    ]


def _outputs(graph: GraphContext, config: PolicyConfig) -> list[TensorSpec]:
    return [
        TensorSpec(
            "logits", "float32", (1, config.text.vocab_size), "of the token after the last position, natural log scale"
        ),
        *_cache_specs(graph, config.text, "present", "total"),
    ]


def _words(graph: GraphContext, ids: str) -> str:
    """Embeddings [1, L, hidden] of ids [1, L]."""
    b = graph.builder
    table = graph.tensors.tensor("language_model.model.embed_tokens.weight").to(torch.bfloat16)
    content = table.contiguous().view(torch.uint8).numpy().tobytes()
    name = b.raw("language_model.model.embed_tokens.weight", TensorProto.BFLOAT16, tuple(table.shape), content)
    return b.cast(b.node("Gather", [name, ids], axis=0), b.float_type)


def _positions(graph: GraphContext, x: str) -> tuple[str, str]:
    """int64 [T], places of this call's inputs in the whole sequence, and the sequence's length after this call."""
    b = graph.builder
    past = b.node("Squeeze", [b.node("Shape", ["past_key_0"], start=2, end=3), b.ints(0)])
    count = b.node("Squeeze", [b.node("Shape", [x], start=1, end=2), b.ints(0)])
    total = b.add(past, count)
    return b.node("Range", [past, total, b.constant(1, np.int64)]), total


def _rotation(graph: GraphContext, positions: str, text: TextSpec) -> tuple[str, str]:
    """Cosine and sine [T, head_dim] of the rotary embedding; computed in float32 whatever the activations are."""
    b = graph.builder
    exponents = np.arange(0, text.head_dim, 2, dtype=np.float32) / np.float32(text.head_dim)
    frequencies = (1.0 / np.power(np.float32(text.rope_theta), exponents)).astype(np.float32)
    column = b.node("Unsqueeze", [b.cast(positions, TensorProto.FLOAT), b.ints(1)])
    angles = b.mul(column, b.constant(frequencies[None], np.float32))
    both = b.concat([angles, angles], axis=1)
    cosine, sine = b.node("Cos", [both]), b.node("Sin", [both])
    if b.float_type != TensorProto.FLOAT:
        cosine, sine = b.cast(cosine, b.float_type), b.cast(sine, b.float_type)
    return cosine, sine


def _causal_mask(graph: GraphContext, positions: str, total: str) -> str:
    """[T, total]: zero where a key may be seen, the lowest number elsewhere."""
    b = graph.builder
    keys = b.node("Range", [b.constant(0, np.int64), total, b.constant(1, np.int64)])
    seen = b.node("LessOrEqual", [keys, b.node("Unsqueeze", [positions, b.ints(1)])])
    return b.node("Where", [seen, b.scalar(0.0), b.scalar(float(np.finfo(b.float_dtype).min))])


def _rms_norm(graph: GraphContext, x: str, name: str, eps: float) -> str:
    """x / sqrt(mean(x^2) + eps) * weight, in float32: squares of float16 activations would overflow."""
    b = graph.builder
    wide = b.cast(x, TensorProto.FLOAT) if b.float_type != TensorProto.FLOAT else x
    mean = b.node("ReduceMean", [b.mul(wide, wide), b.ints(-1)], keepdims=1)
    normalised = b.node("Div", [wide, b.node("Sqrt", [b.add(mean, b.constant(eps, np.float32))])])
    scaled = b.mul(normalised, graph.parameter(name, np.float32))
    return b.cast(scaled, b.float_type) if b.float_type != TensorProto.FLOAT else scaled


def _layer(
    graph: GraphContext, x: str, rotation: tuple[str, str], mask: str | None, text: TextSpec, index: int
) -> str:
    """One block. mask: of a pass that reads and extends the cache; None where every position sees every other."""
    b, name = graph.builder, f"language_model.model.layers.{index}"
    attended = _attention(graph, _rms_norm(graph, x, f"{name}.input_layernorm.weight", text.rms_norm_eps),
                          rotation, mask, text, index)  # fmt: skip
    x = b.add(x, attended)
    normalised = _rms_norm(graph, x, f"{name}.post_attention_layernorm.weight", text.rms_norm_eps)
    gate = graph.linear(normalised, f"{name}.mlp.gate_proj")
    gated = b.mul(b.mul(gate, b.node("Sigmoid", [gate])), graph.linear(normalised, f"{name}.mlp.up_proj"))
    return b.add(x, graph.linear(gated, f"{name}.mlp.down_proj"))


def _attention(
    graph: GraphContext, x: str, rotation: tuple[str, str], mask: str | None, text: TextSpec, index: int
) -> str:
    b, name = graph.builder, f"language_model.model.layers.{index}.self_attn"
    query = _rotate(graph, _heads(graph, x, f"{name}.q_proj", text.num_attention_heads, text), rotation)
    key = _rotate(graph, _heads(graph, x, f"{name}.k_proj", text.num_key_value_heads, text), rotation)
    value = _heads(graph, x, f"{name}.v_proj", text.num_key_value_heads, text)
    if mask is not None:
        key = b.concat([f"past_key_{index}", key], axis=2, name=f"present_key_{index}")
        value = b.concat([f"past_value_{index}", value], axis=2, name=f"present_value_{index}")
    key, value = _shared(graph, key, text), _shared(graph, value, text)
    scores = b.matmul(b.mul(query, b.scalar(text.head_dim**-0.5)), b.transpose(key, 0, 1, 3, 2))
    if mask is not None:
        scores = b.add(scores, mask)
    mixed = b.transpose(b.matmul(b.node("Softmax", [scores], axis=-1), value), 0, 2, 1, 3)
    return graph.linear(b.reshape(mixed, 1, -1, text.num_attention_heads * text.head_dim), f"{name}.o_proj")


def _heads(graph: GraphContext, x: str, name: str, heads: int, text: TextSpec) -> str:
    b = graph.builder
    return b.transpose(b.reshape(graph.linear(x, name), 1, -1, heads, text.head_dim), 0, 2, 1, 3)


def _shared(graph: GraphContext, x: str, text: TextSpec) -> str:
    """Repeats key/value heads [1, kv, T, d] for the query heads that share them."""
    repeats = text.num_attention_heads // text.num_key_value_heads
    if repeats == 1:
        return x
    b = graph.builder
    tiled = b.node("Tile", [b.node("Unsqueeze", [x, b.ints(2)]), b.ints(1, 1, repeats, 1, 1)])
    return b.reshape(tiled, 1, text.num_attention_heads, -1, text.head_dim)


def _rotate(graph: GraphContext, x: str, rotation: tuple[str, str]) -> str:
    """Rotary position embedding of [1, heads, T, d]: x cos + (-x2, x1) sin, halves as in Llama."""
    b = graph.builder
    first, second = b.nodes("Split", [x], 2, axis=-1, num_outputs=2)
    turned = b.concat([b.node("Neg", [second]), first], axis=-1)
    return b.add(b.mul(x, rotation[0]), b.mul(turned, rotation[1]))
