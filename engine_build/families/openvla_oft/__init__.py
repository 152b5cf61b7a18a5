"""OpenVLA-OFT's graphs: `vision`, and a decoder that decides in one pass.

It reads [BOS][patches][state][prompt][empty actions][EOS], without a cache, and ends with the head that reads the
actions.
"""

from dataclasses import replace
from types import MappingProxyType

import numpy as np
from onnx import TensorProto

from calibrator.families.openvla_oft.model import HEAD_BLOCKS
from engine_build.families.base import Tensors
from engine_build.graph import fixed, llama, vision
from engine_build.graph.context import GraphContext
from vla_policy.core.families.openvla_oft import OftConfig
from vla_policy.core.prismatic.prompt import LONGEST_PROMPT, TYPICAL_PROMPT
from vla_policy.core.program import COUNT, ROWS, Call, Range, Sequences, TensorSpec

_LAYER_NORM_EPS = 1e-5


def decoder(graph: GraphContext, config: OftConfig) -> Tensors:
    """Writes the decoder with the state's projector and the head."""
    b, text, chunk = graph.builder, config.text, config.horizon
    values, free = chunk * config.action_dim, graph.sequences is Sequences.FREE
    x, seen = _free(graph, config) if free else _fixed(graph, config)
    for index in range(text.num_hidden_layers):
        x = llama.block(graph, x, seen, text, index)
    if free:
        x = b.slice(x, -values - 2, -2, 1)
    else:
        begin = b.node("Sub", [COUNT, b.ints(values + 2)])
        x = b.node("Gather", [x, b.add(b.constant(np.arange(values), np.int64), begin)], axis=1)
    x = llama.rms_norm(graph, x, "language_model.model.norm.weight", text.rms_norm_eps)
    x = _head(graph, b.reshape(x, 1, chunk, config.action_dim * text.hidden_size))
    b.rename(b.cast(x, TensorProto.FLOAT) if b.float_type != TensorProto.FLOAT else x, "actions")
    float_name = b.float_dtype.__name__
    inputs = [
        TensorSpec(ROWS, "int64", (1, ROWS), "token ids of the sequence, 0 where a row is no word"),
        TensorSpec("patches", float_name, (1, config.num_patches, text.hidden_size), "from the vision graph"),
    ]
    if config.use_proprio:
        inputs.append(TensorSpec("state", float_name, (1, config.state_dim), "the robot's, normalised to [-1, 1]"))
    if not free:
        inputs.append(fixed.COUNT_SPEC)
    actions = TensorSpec("actions", "float32", (1, chunk, config.action_dim), "of the next control steps, normalised")
    return inputs, [actions]


def _free(graph: GraphContext, config: OftConfig) -> tuple[str, llama.Bidirectional]:
    """The embeddings of all rows, and how these see each other."""
    b, text, behind = graph.builder, config.text, len(config.behind_prompt)
    begin = 1 + config.num_patches + config.use_proprio
    parts = (b.slice("rows", *ends, 1) for ends in ((0, 1), (begin, -behind), (-1, llama.LAST)))
    words = llama.words(graph, b.concat(list(parts), axis=1))
    state = [_state(graph, config)] if config.use_proprio else []
    empty = b.tensor("empty_actions", np.zeros((1, behind - 1, text.hidden_size), b.float_dtype))
    first, prompt, end = (b.slice(words, *ends, 1) for ends in ((0, 1), (1, -1), (-1, llama.LAST)))
    x = b.concat([first, "patches", *state, prompt, empty, end], axis=1)
    length = b.node("Squeeze", [b.node("Shape", [x], start=1, end=2), b.ints(0)])
    places = b.node("Range", [b.constant(0, np.int64), length, b.constant(1, np.int64)])
    return x, llama.Bidirectional(llama.rotary(graph, places, text.head_dim, text.rope_theta, _longest(config)))


def _fixed(graph: GraphContext, config: OftConfig) -> tuple[str, llama.Bidirectional]:
    """The same for rows of fixed number, of which the last may be filling."""
    b, text, behind = graph.builder, config.text, len(config.behind_prompt)
    places = fixed.first(graph, _longest(config), "rows")
    x = fixed.with_patches(graph, llama.words(graph, "rows"), places, 1, config.num_patches)
    if config.use_proprio:
        here = b.node("Equal", [places, b.ints(1 + config.num_patches)])
        x = b.node("Where", [b.node("Unsqueeze", [here, b.ints(1)]), _state(graph, config), x])
    begin, end = (b.node("Sub", [COUNT, b.ints(rows)]) for rows in (behind, 1))
    empty = b.node("And", [b.node("GreaterOrEqual", [places, begin]), b.node("Less", [places, end])])
    x = b.node("Where", [b.node("Unsqueeze", [empty, b.ints(1)]), b.scalar(0.0), x])
    rotation = llama.rotary(graph, places, text.head_dim, text.rope_theta, _longest(config))
    return x, llama.Bidirectional(rotation, fixed.before(graph, places, COUNT))


def _beside_prompt(config: OftConfig) -> int:
    """Rows that are not the prompt's."""
    return config.num_patches + config.use_proprio + len(config.behind_prompt)


def _longest(config: OftConfig) -> int:
    return _beside_prompt(config) + LONGEST_PROMPT


def _state(graph: GraphContext, config: OftConfig) -> str:
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


class OpenVlaOft:
    """The family."""

    graphs = MappingProxyType({"vision": vision.build, "decoder": decoder})

    def program(self, config: OftConfig, sequences: Sequences) -> dict[str, Call]:
        rows = Range.in_quarters(_beside_prompt(config), 2, TYPICAL_PROMPT, LONGEST_PROMPT)
        if sequences is Sequences.FREE:
            rows = replace(rows, steps=())
        return {
            "vision": Call("vision", {}, {"patches": "patches"}),
            "decide": Call("decoder", {ROWS: rows}, {}),
        }


FAMILY = OpenVlaOft()
