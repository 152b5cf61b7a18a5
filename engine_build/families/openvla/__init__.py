"""OpenVLA's graphs: `vision`, and a decoder with a key/value cache, whose head has the action tokens' rows alone.

Prefill and decode step are one graph on one copy of the weights. The input embeddings are [first id][patches][other
ids]: prefill passes BOS, P patches and the prompt; a decode step passes one id and no patches. Positions and the causal
mask follow from the length of the cache.
"""

from types import MappingProxyType

from onnx import TensorProto

from engine_build.families.base import Tensors
from engine_build.graph import llama, vision
from engine_build.graph.context import GraphContext
from vla_policy.core.prismatic.config import PrismaticConfig
from vla_policy.core.prismatic.prompt import LONGEST_PROMPT, TYPICAL_PROMPT
from vla_policy.core.program import Call, Range, TensorSpec


def decoder(graph: GraphContext, config: PrismaticConfig) -> Tensors:
    """Writes the decoder."""
    b, text = graph.builder, config.text
    words = llama.words(graph, "input_ids")
    x = b.concat([b.slice(words, 0, 1, 1), "patches", b.slice(words, 1, llama.LAST, 1)], axis=1)
    seen = llama.causal(graph, x, text, _longest(config))
    for index in range(text.num_hidden_layers):
        x = llama.block(graph, x, seen, text, index)
    last = llama.rms_norm(graph, b.slice(x, -1, llama.LAST, 1), "language_model.model.norm.weight", text.rms_norm_eps)
    logits = b.reshape(graph.linear(last, "language_model.lm_head"), 1, config.n_action_bins)
    b.rename(b.cast(logits, TensorProto.FLOAT) if b.float_type != TensorProto.FLOAT else logits, "logits")
    return _inputs(graph, config), _outputs(graph, config)


def _inputs(graph: GraphContext, config: PrismaticConfig) -> list[TensorSpec]:
    float_name = graph.builder.float_dtype.__name__
    return [
        TensorSpec("input_ids", "int64", (1, "ids"), "token ids: the prompt from BOS on, or one action token"),
        TensorSpec(
            "patches",
            float_name,
            (1, "patches", config.text.hidden_size),
            f"from the vision graph: {config.num_patches} patches to prefill, none to decode",
        ),
        *llama.cache_specs(graph, config.text, "past", "past"),
    ]


def _outputs(graph: GraphContext, config: PrismaticConfig) -> list[TensorSpec]:
    return [
        TensorSpec(
            "logits",
            "float32",
            (1, config.n_action_bins),
            "of the action tokens after the last position, from the lowest id on, natural log scale",
        ),
        *llama.cache_specs(graph, config.text, "present", "total"),
    ]


def _longest(config: PrismaticConfig) -> int:
    """Positions of the longest sequence: patches, prompt and action tokens."""
    return config.num_patches + LONGEST_PROMPT + max(stats.action.dim for stats in config.norm_stats.values())


class OpenVla:
    """The family."""

    graphs = MappingProxyType({"vision": vision.build, "decoder": decoder})

    def program(self, config: PrismaticConfig) -> dict[str, Call]:
        """The step admits one patch, though it has none: from 8 heads on, TensorRT-RTX 1.7 crashes where it knows ahead
        that a tensor is empty."""
        count, longest = config.num_patches, _longest(config)
        typical = count + TYPICAL_PROMPT
        present, past = (llama.cache_names(config.text, state) for state in ("present", "past"))
        carried = dict(zip(present, past, strict=True))
        prefill = {
            "ids": Range(2, TYPICAL_PROMPT, LONGEST_PROMPT),
            "patches": Range.fixed(count),
            "past": Range.fixed(0),
            "total": Range(count + 2, typical, count + LONGEST_PROMPT),
        }
        step = {
            "ids": Range.fixed(1),
            "patches": Range(0, 0, 1),
            "past": Range(1, typical, longest),
            "total": Range(2, typical + 1, longest + 1),
        }
        return {
            "vision": Call("vision", {}, {"patches": "patches"}),
            "prefill": Call("decoder", prefill, carried),
            "step": Call("decoder", step, carried),
        }


FAMILY = OpenVla()
