"""SigLIP and PaliGemma's projector: pixel_values [1, 3 N, S, S] -> patches [1, N P, hidden]."""

from engine_build.graph.context import GraphContext
from vla_policy.core.flow.config import FlowConfig, SiglipSpec
from vla_policy.core.program import TensorSpec

_NORM_EPS = 1e-6


def build(
    graph: GraphContext, config: FlowConfig, tower: str, projector: str
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Writes the graph; returns its inputs and outputs. tower, projector: their names in the checkpoint."""
    b, spec, count = graph.builder, config.vision, config.num_images
    positions = graph.parameter(f"{tower}.embeddings.position_embedding.weight")
    x = b.add(_patch_embed(graph, b.as_activations("pixel_values"), count, spec, tower), positions)
    for number in range(spec.num_hidden_layers):
        x = _block(graph, x, count, spec, f"{tower}.encoder.layers.{number}")
    x = graph.layer_norm(x, f"{tower}.post_layernorm", _NORM_EPS)
    b.rename(graph.linear(b.reshape(x, 1, config.num_patches, spec.hidden_size), projector), "patches")
    size = spec.image_size
    pixels = TensorSpec(
        "pixel_values", graph.io_dtype.name, (1, 3 * count, size, size), "in [-1, 1], no unit; see preprocessing"
    )
    patches = TensorSpec(
        "patches", b.float_dtype.__name__, (1, config.num_patches, config.text.hidden_size), "image embeddings, no unit"
    )
    return [pixels], [patches]


def _patch_embed(graph: GraphContext, pixels: str, images: int, spec: SiglipSpec, tower: str) -> str:
    """The convolution, whose patches do not overlap, as a linear map of each patch's 3 p p values."""
    b = graph.builder
    patch, side = spec.patch_size, spec.image_size // spec.patch_size
    tiles = b.transpose(b.reshape(pixels, images, 3, side, patch, side, patch), 0, 2, 4, 1, 3, 5)
    flat = b.reshape(tiles, images, side * side, 3 * patch * patch)
    return graph.linear(flat, f"{tower}.embeddings.patch_embedding")


def _block(graph: GraphContext, x: str, images: int, spec: SiglipSpec, name: str) -> str:
    b = graph.builder
    x = b.add(x, _attention(graph, graph.layer_norm(x, f"{name}.layer_norm1", _NORM_EPS), images, spec, name))
    inner = graph.linear(graph.layer_norm(x, f"{name}.layer_norm2", _NORM_EPS), f"{name}.mlp.fc1")
    return b.add(x, graph.linear(b.node("Gelu", [inner], approximate="tanh"), f"{name}.mlp.fc2"))


def _attention(graph: GraphContext, x: str, images: int, spec: SiglipSpec, name: str) -> str:
    b = graph.builder

    def heads(part: str) -> str:
        values = graph.linear(x, f"{name}.self_attn.{part}_proj")
        return b.transpose(b.reshape(values, images, -1, spec.num_attention_heads, spec.head_dim), 0, 2, 1, 3)

    query, key, value = (heads(part) for part in "qkv")
    scores = b.matmul(b.mul(query, b.scalar(spec.head_dim**-0.5)), b.transpose(key, 0, 1, 3, 2))
    mixed = b.transpose(b.matmul(b.node("Softmax", [scores], axis=-1), value), 0, 2, 1, 3)
    return graph.linear(b.reshape(mixed, images, -1, spec.hidden_size), f"{name}.self_attn.out_proj")
