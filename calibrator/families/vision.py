"""The two vision transformers of OpenVLA and their fusion by channels.

Parameter names are the published checkpoint's. Features are the output of the block before the last, patches only,
not normalised, so the last block, the final norm and SigLIP's attention pool never run and are not built. A policy of N
images passes each through the same towers; their patches follow each other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_policy.core.policy_config import TowerSpec

_NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Non-overlapping patches, linearly embedded: [B, 3, S, S] -> [B, P, width], row by row."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, spec.width, kernel_size=spec.patch_size, stride=spec.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two layers with exact (erf) GELU: [.., inputs] -> [.., outputs]."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Per-channel factor after a residual branch (DINOv2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class Block(nn.Module):
    """Pre-norm transformer block; LayerScale only in DINOv2."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        scaled = spec.kind == "dinov2"
        self.norm1 = nn.LayerNorm(spec.width, eps=_NORM_EPS)
        self.attn = Attention(spec.width, spec.heads)
        self.ls1 = LayerScale(spec.width) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(spec.width, eps=_NORM_EPS)
        self.mlp = Mlp(spec.width, spec.mlp_width, spec.width)
        self.ls2 = LayerScale(spec.width) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTower(nn.Module):
    """One tower: [B, 3, S, S] -> patch features [B, P, width]."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.patch_embed = PatchEmbed(spec)
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.num_patches, spec.width))
        if spec.kind == "dinov2":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.width))
            self.reg_token = nn.Parameter(torch.zeros(1, spec.registers, spec.width))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.live_blocks))

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """What enters the first block: [B, prefix + P, width]."""
        x = self.patch_embed(pixel_values) + self.pos_embed
        if self.spec.kind == "dinov2":
            batch = x.shape[0]
            x = torch.cat([self.cls_token.expand(batch, -1, -1), self.reg_token.expand(batch, -1, -1), x], dim=1)
        return x

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.tokens(pixel_values)
        for block in self.blocks:
            x = block(x)
        return x[:, self.spec.prefix_tokens :]


def by_image(pixel_values: Tensor) -> Tensor:
    """[B, 6 N, S, S] -> [B N, 6, S, S]: every image of every state by itself."""
    return pixel_values.unflatten(1, (-1, 6)).flatten(0, 1)


def fuse(features: Sequence[Tensor], states: int) -> Tensor:
    """Both towers' features [B N, P, width] side by side, image after image of each state: [B, N P, width of both]."""
    return torch.cat(tuple(features), dim=2).unflatten(0, (states, -1)).flatten(1, 2)


class VisionBackbone(nn.Module):
    """DINOv2 and SigLIP side by side: [B, 6 N, S, S] -> [B, N P, width of both]."""

    def __init__(self, towers: tuple[TowerSpec, TowerSpec]) -> None:
        super().__init__()
        self.featurizer = VisionTower(towers[0])
        self.fused_featurizer = VisionTower(towers[1])

    def forward(self, pixel_values: Tensor) -> Tensor:
        images = by_image(pixel_values)
        return fuse([self.featurizer(images[:, :3]), self.fused_featurizer(images[:, 3:])], len(pixel_values))


class Projector(nn.Module):
    """Three layers with GELU between: [B, P, vision] -> 4 vision -> hidden -> hidden."""

    def __init__(self, vision_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
        self.fc2 = nn.Linear(4 * vision_dim, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc3(functional.gelu(self.fc2(functional.gelu(self.fc1(features)))))
