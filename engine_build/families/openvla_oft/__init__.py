"""OpenVLA-OFT's graphs: `vision`, and a decoder that decides in one pass.

It reads [BOS][patches][state][prompt][empty actions][EOS], without cache or mask, and ends with the head that reads the
actions.
"""

from types import MappingProxyType

import numpy as np
from onnx import TensorProto

from calibrator.families.openvla_oft.model import EOS, HEAD_BLOCKS
from engine_build.families.base import Tensors
from engine_build.graph import llama, vision
from engine_build.graph.context import GraphContext
from vla_policy.core.families.openvla_oft import OftConfig
from vla_policy.core.prismatic.prompt import LONGEST_PROMPT, TYPICAL_PROMPT
from vla_policy.core.program import Call, Range, TensorSpec

_LAYER_NORM_EPS = 1e-5


def decoder(graph: GraphContext, config: OftConfig) -> Tensors:
    """Writes the decoder with the state's projector and the head."""
    b, text, chunk = graph.builder, config.text, config.horizon
    values = chunk * config.action_dim
    ids = b.concat(["input_ids", b.constant([[EOS]], np.int64)], axis=1)
    words = llama.words(graph, ids)
    state = [_state(graph, config)] if config.use_proprio else []
    empty = b.tensor("empty_actions", np.zeros((1, values, text.hidden_size), b.float_dtype))
    first, prompt, end = (b.slice(words, *ends, 1) for ends in ((0, 1), (1, -1), (-1, llama.LAST)))
    x = b.concat([first, "patches", *state, prompt, empty, end], axis=1)
    length = b.node("Squeeze", [b.node("Shape", [x], start=1, end=2), b.ints(0)])
    places = b.node("Range", [b.constant(0, np.int64), length, b.constant(1, np.int64)])
    seen = llama.Bidirectional(llama.rotary(graph, places, text.head_dim, text.rope_theta))
    for index in range(text.num_hidden_layers):
        x = llama.block(graph, x, seen, text, index)
    x = llama.rms_norm(graph, b.slice(x, -values - 2, -2, 1), "language_model.model.norm.weight", text.rms_norm_eps)
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

    def program(self, config: OftConfig) -> dict[str, Call]:
        prompt = Range(2, TYPICAL_PROMPT, LONGEST_PROMPT)
        return {
            "vision": Call("vision", {}, {"patches": "patches"}),
            "decide": Call("decoder", {"ids": prompt}, {}),
        }


FAMILY = OpenVlaOft()
