"""Both vision towers and the projector: pixel_values [1, 6 N, S, S] -> patches [1, N P, hidden].

The N images of a policy are the towers' batch; their patches follow each other.
"""

from onnx import helper

from engine_build.graph.context import GraphContext
from vla_policy.core.prismatic.config import PrismaticConfig, TowerSpec
from vla_policy.core.program import TensorSpec

_NORM_EPS = 1e-6


def build(graph: GraphContext, config: PrismaticConfig) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Writes the graph; returns its inputs and outputs."""
    b = graph.builder
    size, hidden, count = config.image_size, config.text.hidden_size, config.num_images
    images = "pixel_values" if count == 1 else b.reshape("pixel_values", count, 6, size, size)
    features = []
    shares = b.nodes("Split", [images], 2, axis=1, num_outputs=2)
    for pixels, tower, name in zip(shares, config.towers, ("featurizer", "fused_featurizer"), strict=True):
        if b.float_type != helper.np_dtype_to_tensor_dtype(graph.io_dtype):
            pixels = b.cast(pixels, b.float_type)
        features.append(_tower(graph, pixels, count, tower, f"vision_backbone.{name}"))
    x = b.concat(features, axis=2)
    if count > 1:
        x = b.reshape(x, 1, config.num_patches, config.vision_dim)
    for layer in ("fc1", "fc2"):
        x = b.node("Gelu", [graph.linear(x, f"projector.{layer}")])
    b.rename(graph.linear(x, "projector.fc3"), "patches")
    inputs = [
        TensorSpec(
            "pixel_values",
            graph.io_dtype.name,
            (1, 6 * count, size, size),
            "normalised pixels, no unit; see preprocessing",
        )
    ]
    outputs = [
        TensorSpec(
            "patches", b.float_dtype.__name__, (1, config.num_patches, hidden), "projected patch embeddings, no unit"
        )
    ]
    return inputs, outputs


def _tower(graph: GraphContext, pixels: str, images: int, spec: TowerSpec, name: str) -> str:
    b = graph.builder
    x = _patch_embed(graph, pixels, images, spec, f"{name}.patch_embed.proj")
    x = b.add(x, graph.parameter(f"{name}.pos_embed"))
    prefix = 0
    if spec.kind == "dinov2":
        prefix = 1 + spec.registers
        first = [graph.parameter(f"{name}.cls_token"), graph.parameter(f"{name}.reg_token")]
        if images > 1:
            first = [b.concat([token] * images, axis=0) for token in first]
        x = b.concat([*first, x], axis=1)
    for index in range(spec.live_blocks):
        x = _block(graph, x, images, spec, f"{name}.blocks.{index}")
    return b.slice(x, prefix, prefix + spec.num_patches, 1) if prefix else x


def _patch_embed(graph: GraphContext, pixels: str, images: int, spec: TowerSpec, name: str) -> str:
    """The convolution, whose patches do not overlap, as a linear map of each patch's 3 p p values."""
    b = graph.builder
    patch, side = spec.patch_size, spec.image_size // spec.patch_size
    tiles = b.transpose(b.reshape(pixels, images, 3, side, patch, side, patch), 0, 2, 4, 1, 3, 5)
    return graph.linear(b.reshape(tiles, images, side * side, 3 * patch * patch), name)


def _block(graph: GraphContext, x: str, images: int, spec: TowerSpec, name: str) -> str:
    b = graph.builder
    mixed = _attention(graph, graph.layer_norm(x, f"{name}.norm1", _NORM_EPS), images, spec, f"{name}.attn")
    x = b.add(x, _layer_scale(graph, mixed, spec, f"{name}.ls1"))
    inner = b.node("Gelu", [graph.linear(graph.layer_norm(x, f"{name}.norm2", _NORM_EPS), f"{name}.mlp.fc1")])
    return b.add(x, _layer_scale(graph, graph.linear(inner, f"{name}.mlp.fc2"), spec, f"{name}.ls2"))


def _layer_scale(graph: GraphContext, x: str, spec: TowerSpec, name: str) -> str:
    return graph.builder.mul(x, graph.parameter(f"{name}.scale_factor")) if spec.kind == "dinov2" else x


def _attention(graph: GraphContext, x: str, images: int, spec: TowerSpec, name: str) -> str:
    b = graph.builder
    head = spec.width // spec.heads
    if graph.fused:
        query, key, value = b.nodes("Split", [graph.linear(x, f"{name}.qkv")], 3, axis=-1, num_outputs=3)
        mixed = b.microsoft("MultiHeadAttention", [query, key, value], f"{name}.attention", num_heads=spec.heads)
        return graph.linear(mixed, f"{name}.proj")
    parts = b.transpose(b.reshape(graph.linear(x, f"{name}.qkv"), images, -1, 3, spec.heads, head), 2, 0, 3, 1, 4)
    query, key, value = (b.node("Gather", [parts, b.constant(index, "int64")], axis=0) for index in range(3))
    scores = b.matmul(b.mul(query, b.scalar(head**-0.5)), b.transpose(key, 0, 1, 3, 2))
    mixed = b.matmul(b.node("Softmax", [scores], axis=-1), value)
    return graph.linear(b.reshape(b.transpose(mixed, 0, 2, 1, 3), images, -1, spec.width), f"{name}.proj")
