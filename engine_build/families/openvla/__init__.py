"""OpenVLA's graphs: `vision`, and a decoder with a key/value cache, whose head has the action tokens' rows alone.

Prefill and decode step are one graph on one copy of the weights. Prefill reads the rows [BOS][patches][prompt], a step
one token. Where the cache grows, a step is fed no patches, and positions and the causal mask follow from the length of
the cache. Where sizes are fixed, patches are fed always and read by the rows whose places they have; see `graph.fixed`.
"""

from types import MappingProxyType

from onnx import TensorProto

from engine_build.families.base import Tensors
from engine_build.graph import fixed, llama, vision
from engine_build.graph.context import GraphContext
from vla_policy.core.prismatic.config import PrismaticConfig
from vla_policy.core.prismatic.prompt import LONGEST_PROMPT, TYPICAL_PROMPT
from vla_policy.core.program import COUNT, ROWS, Call, Range, Sequences, TensorSpec


def decoder(graph: GraphContext, config: PrismaticConfig) -> Tensors:
    """Writes the decoder."""
    b, text = graph.builder, config.text
    x, seen = _growing(graph, config) if graph.sequences is Sequences.FREE else _fixed(graph, config)
    for index in range(text.num_hidden_layers):
        x = llama.block(graph, x, seen, text, index)
    if graph.sequences is Sequences.FREE:
        last = b.slice(x, -1, llama.LAST, 1)
    else:
        last = b.node("Gather", [x, b.node("Sub", [COUNT, b.ints(1)])], axis=1)
    last = llama.rms_norm(graph, last, "language_model.model.norm.weight", text.rms_norm_eps)
    logits = b.reshape(graph.linear(last, "language_model.lm_head"), 1, config.n_action_bins)
    b.rename(b.cast(logits, TensorProto.FLOAT) if b.float_type != TensorProto.FLOAT else logits, "logits")
    return _inputs(graph, config), _outputs(graph, config)


def _growing(graph: GraphContext, config: PrismaticConfig) -> tuple[str, llama.Seen]:
    """The embeddings of a call's rows, and how these see each other."""
    b = graph.builder
    ids = b.concat([b.slice("rows", 0, 1, 1), b.slice("rows", 1 + config.num_patches, llama.LAST, 1)], axis=1)
    words = llama.words(graph, ids)
    x = b.concat([b.slice(words, 0, 1, 1), "patches", b.slice(words, 1, llama.LAST, 1)], axis=1)
    return x, llama.causal(graph, x, config.text, _longest(config))


def _fixed(graph: GraphContext, config: PrismaticConfig) -> tuple[str, llama.Seen]:
    """The same for rows of fixed number: each is the patch of its place, or the word of its id."""
    seen, places = llama.cached(graph, "rows", config.text, _longest(config))
    return fixed.with_patches(graph, llama.words(graph, "rows"), places, 1, config.num_patches), seen


def _inputs(graph: GraphContext, config: PrismaticConfig) -> list[TensorSpec]:
    free, hidden = graph.sequences is Sequences.FREE, config.text.hidden_size
    fed = "all to prefill, none to decode" if free else "always"
    return [
        TensorSpec(ROWS, "int64", (1, ROWS), "token ids: the prompt's with 0 for each patch, or one action token"),
        TensorSpec(
            "patches",
            graph.builder.float_dtype.__name__,
            (1, "patches" if free else config.num_patches, hidden),
            f"from the vision graph, {fed}",
        ),
        *llama.cache_specs(graph, config.text, "past", "past" if free else _longest(config)),
        *([] if free else [fixed.COUNT_SPEC, fixed.POSITION_SPEC]),
    ]


def _outputs(graph: GraphContext, config: PrismaticConfig) -> list[TensorSpec]:
    logits = TensorSpec(
        "logits",
        "float32",
        (1, config.n_action_bins),
        "of the action tokens after the last position, from the lowest id on, natural log scale",
    )
    length: dict[Sequences, int | str] = {Sequences.FREE: "total", Sequences.UPDATED: _longest(config)}
    return [logits, *llama.cache_specs(graph, config.text, _LEFT[graph.sequences], length.get(graph.sequences, ROWS))]


_LEFT = {Sequences.FREE: "present", Sequences.UPDATED: "present", Sequences.APPENDED: "new"}
"""Names of what a call leaves: the whole cache, or its new rows."""


def _longest(config: PrismaticConfig) -> int:
    """Positions of the longest sequence: patches, prompt and action tokens."""
    return config.num_patches + LONGEST_PROMPT + max(stats.action.dim for stats in config.norm_stats.values())


class OpenVla:
    """The family."""

    graphs = MappingProxyType({"vision": vision.build, "decoder": decoder})

    def program(self, config: PrismaticConfig, sequences: Sequences) -> dict[str, Call]:
        """Where the cache grows, the step admits one patch, though it has none: an empty tensor of a size that cannot
        vary is no case for a runtime."""
        count, longest = config.num_patches, _longest(config)
        typical = count + TYPICAL_PROMPT
        left, past = (llama.cache_names(config.text, state) for state in (_LEFT[sequences], "past"))
        kept = dict(zip(left, past, strict=True))
        vision = Call("vision", {}, {"patches": "patches"})
        if sequences is not Sequences.FREE:
            carried, appended = (kept, {}) if sequences is Sequences.UPDATED else ({}, kept)
            prompt = Range.in_quarters(count, 2, TYPICAL_PROMPT, LONGEST_PROMPT)
            return {
                "vision": vision,
                "prefill": Call("decoder", {ROWS: prompt}, carried, appended),
                "step": Call("decoder", {ROWS: Range.fixed(1)}, carried, appended),
            }
        prefill = {
            ROWS: Range(count + 2, typical, count + LONGEST_PROMPT),
            "patches": Range.fixed(count),
            "past": Range.fixed(0),
            "total": Range(count + 2, typical, count + LONGEST_PROMPT),
        }
        step = {
            ROWS: Range.fixed(1),
            "patches": Range(0, 0, 1),
            "past": Range(1, typical, longest),
            "total": Range(2, typical + 1, longest + 1),
        }
        return {"vision": vision, "prefill": Call("decoder", prefill, kept), "step": Call("decoder", step, kept)}


FAMILY = OpenVla()
