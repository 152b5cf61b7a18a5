"""SigLIP as PaliGemma has it: all blocks run, learned positions, no class token, a norm at the end.

Parameter names are the published checkpoints'.
"""

from torch import Tensor, nn
from torch.nn import functional

from calibrator.modules.chain import Layers, Runs, Segment
from vla_policy.core.flow.config import SiglipSpec

_NORM_EPS = 1e-6
_FUSED = {f"self_attn.{part}_proj": "self_attn.qkv" for part in "qkv"}
_AFTER_NORMS = {
    "layer_norm1": tuple(_FUSED),
    "layer_norm2": ("mlp.fc1",),
}


class SiglipAttention(nn.Module):
    """Multi-head self-attention, every position sees every other."""

    def __init__(self, spec: SiglipSpec) -> None:
        super().__init__()
        self.heads = spec.num_attention_heads
        width = spec.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class SiglipMlp(nn.Module):
    """Two layers with GELU by its tanh formula."""

    def __init__(self, spec: SiglipSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.hidden_size, spec.intermediate_size)
        self.fc2 = nn.Linear(spec.intermediate_size, spec.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class SiglipBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, spec: SiglipSpec) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(spec.hidden_size, eps=_NORM_EPS)
        self.self_attn = SiglipAttention(spec)
        self.layer_norm2 = nn.LayerNorm(spec.hidden_size, eps=_NORM_EPS)
        self.mlp = SiglipMlp(spec)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipEmbeddings(nn.Module):
    """Patches and their places: [B, 3, S, S] -> [B, P, width], row by row."""

    def __init__(self, spec: SiglipSpec) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, spec.hidden_size, kernel_size=spec.patch_size, stride=spec.patch_size)
        self.position_embedding = nn.Embedding(spec.num_patches, spec.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + self.position_embedding.weight


class SiglipEncoder(nn.Module):
    """The blocks."""

    def __init__(self, spec: SiglipSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipBlock(spec) for _ in range(spec.num_hidden_layers))


class SiglipModel(nn.Module):
    """[B, 3 N, S, S] of N images -> [B, N P, width]: each image by itself, their patches one after the other."""

    def __init__(self, spec: SiglipSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embeddings = SiglipEmbeddings(spec)
        self.encoder = SiglipEncoder(spec)
        self.post_layernorm = nn.LayerNorm(spec.hidden_size, eps=_NORM_EPS)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.embeddings(pixel_values.unflatten(1, (-1, 3)).flatten(0, 1))
        for block in self.encoder.layers:
            x = block(x)
        return self.post_layernorm(x).unflatten(0, (len(pixel_values), -1)).flatten(1, 2)

    def segments(self, path: str, images: int) -> list[Segment]:
        """From `pixel_values` to the value `vision`, of this module as the policy's submodule `path`."""
        runs = (Runs(images * self.spec.num_patches),)

        def layers(part: str, block: bool) -> tuple[Layers, ...]:
            fused, after = (_FUSED, _AFTER_NORMS) if block else ({}, {})
            label = part.removeprefix("encoder.")
            return (Layers(f"{path}.{part}", f"vision.{label}", "vision", "vision", lambda *_: runs, fused, after),)

        def patches(pixel_values: Tensor) -> Tensor:
            return self.embeddings(pixel_values.unflatten(1, (-1, 3)).flatten(0, 1))

        def features(x: Tensor) -> Tensor:
            return self.post_layernorm(x).unflatten(0, (-1, images)).flatten(1, 2)

        found = [Segment("patches", ("pixel_values",), patches, layers("embeddings", False))]
        for number, block in enumerate(self.encoder.layers):
            within = layers(f"encoder.layers.{number}", True)
            found.append(Segment(f"vision.{number}", (found[-1].name,), block, within))
        return [*found, Segment("vision", (found[-1].name,), features)]


class SiglipTower(nn.Module):
    """The published name's level."""

    def __init__(self, spec: SiglipSpec) -> None:
        super().__init__()
        self.vision_model = SiglipModel(spec)


