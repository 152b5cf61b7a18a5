"""Prismatic's two vision transformers, their fusion by channels, and the projector behind them.

Parameter names are the published checkpoints'. Features are the output of the block before the last, patches only,
not normalised, so the last block, the final norm and SigLIP's attention pool never run and are not built. A policy of N
images passes each through the same towers; their patches follow each other.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibrator.modules.chain import Layers, Runs, Segment
from vla_policy.core.prismatic.config import TowerSpec

_NORM_EPS = 1e-6
_TOWERS = ("featurizer", "fused_featurizer")
_CHANNELS = (slice(0, 3), slice(3, 6))
_AFTER_NORMS = {"norm1": ("attn.qkv",), "norm2": ("mlp.fc1",)}
_TITLES = {"dinov2": "DINOv2", "siglip": "SigLIP"}


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

    def features(self, x: Tensor) -> Tensor:
        """Of the last block's output [B, prefix + P, width] the patches."""
        return x[:, self.spec.prefix_tokens :]

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.tokens(pixel_values)
        for block in self.blocks:
            x = block(x)
        return self.features(x)

    def segments(self, path: str, label: str, channels: slice, images: int) -> list[Segment]:
        """From `pixel_values` of `images` images to the last block's output, of this tower as the policy's submodule
        `path`. channels: of an image's six, those that it sees."""
        spec, track = self.spec, f"vision: {_TITLES[self.spec.kind]}"

        def patches(pixel_values: Tensor) -> Tensor:
            return self.tokens(by_image(pixel_values)[:, channels])

        def layers(part: str, tokens: int, after_norms: Mapping[str, tuple[str, ...]]) -> Layers:
            runs = (Runs(images * tokens),)
            return Layers(
                f"{path}.{part}", f"{label}.{part}", "vision", track, lambda *_: runs, after_norms=after_norms
            )

        embedding = layers("patch_embed", spec.num_patches, {})
        segments = [Segment(f"{spec.kind}.patches", ("pixel_values",), patches, (embedding,))]
        for number, block in enumerate(self.blocks):
            tokens = spec.prefix_tokens + spec.num_patches
            before = segments[-1].name
            within = layers(f"blocks.{number}", tokens, _AFTER_NORMS)
            segments.append(Segment(f"{spec.kind}.{number}", (before,), block, (within,)))
        return segments


def by_image(pixel_values: Tensor) -> Tensor:
    """[B, 6 N, S, S] -> [B N, 6, S, S]: every image of every state by itself."""
    return pixel_values.unflatten(1, (-1, 6)).flatten(0, 1)


def fuse(features: Sequence[Tensor], states: int) -> Tensor:
    """Both towers' features [B N, P, width] side by side, image after image of each state: [B, N P, width of both]."""
    return torch.cat(tuple(features), dim=2).unflatten(0, (states, -1)).flatten(1, 2)


class VisionBackbone(nn.Module):
    """DINOv2 and SigLIP side by side: [B, 6 N, S, S] -> [B, N P, width of both]."""

    def __init__(self, towers: tuple[TowerSpec, TowerSpec], images: int) -> None:
        super().__init__()
        self.images = images
        self.featurizer = VisionTower(towers[0])
        self.fused_featurizer = VisionTower(towers[1])

    def forward(self, pixel_values: Tensor) -> Tensor:
        images = by_image(pixel_values)
        features = [tower(images[:, channels]) for tower, channels in zip(self.towers, _CHANNELS, strict=True)]
        return fuse(features, len(pixel_values))

    @property
    def towers(self) -> tuple[VisionTower, VisionTower]:
        return self.featurizer, self.fused_featurizer

    def segments(self, path: str) -> list[Segment]:
        """From `pixel_values` to the value `vision`, of this module as the policy's submodule `path`."""
        segments: list[Segment] = []
        ends = []
        for name, tower, channels in zip(_TOWERS, self.towers, _CHANNELS, strict=True):
            segments += tower.segments(f"{path}.{name}", name, channels, self.images)
            ends.append(segments[-1].name)

        def fused(*outputs: Tensor) -> Tensor:
            features = [tower.features(x) for tower, x in zip(self.towers, outputs, strict=True)]
            return fuse(features, len(features[0]) // self.images)

        return [*segments, Segment("vision", tuple(ends), fused)]


class Projector(nn.Module):
    """Three layers with GELU between: [B, P, vision] -> 4 vision -> hidden -> hidden."""

    def __init__(self, vision_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
        self.fc2 = nn.Linear(4 * vision_dim, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc3(functional.gelu(self.fc2(functional.gelu(self.fc1(features)))))

    def segment(self, path: str, patches: int) -> Segment:
        """From `vision` to the value `projector`, of this module as the policy's submodule `path`."""
        runs = (Runs(patches),)
        layers = Layers(path, path, "projector", "projector", lambda *_: runs)
        return Segment("projector", ("vision",), self, (layers,))


def dead_tower_tensors(path: str, towers: tuple[TowerSpec, TowerSpec]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published tensors of both towers that inference never reads."""
    return {
        f"{path}.{tower}.{name}": shape
        for tower, spec in zip(_TOWERS, towers, strict=True)
        for name, shape in _dead_tensors(spec).items()
    }


def _dead_tensors(spec: TowerSpec) -> dict[str, tuple[int, ...]]:
    width, hidden = spec.width, spec.mlp_width
    block = f"blocks.{spec.depth - 1}."
    layers = {
        f"{block}attn.qkv": (3 * width, width),
        f"{block}attn.proj": (width, width),
        f"{block}mlp.fc1": (hidden, width),
        f"{block}mlp.fc2": (width, hidden),
    }
    norms = [f"{block}norm1", f"{block}norm2", "norm"]
    shapes: dict[str, tuple[int, ...]] = {}
    if spec.kind == "dinov2":
        shapes |= {f"{block}{scale}.scale_factor": (width,) for scale in ("ls1", "ls2")}
    else:
        pool = "attn_pool."
        layers |= {
            f"{pool}q": (width, width),
            f"{pool}kv": (2 * width, width),
            f"{pool}proj": (width, width),
            f"{pool}mlp.fc1": (hidden, width),
            f"{pool}mlp.fc2": (width, hidden),
        }
        norms.append(f"{pool}norm")
        shapes[f"{pool}latent"] = (1, 1, width)
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes
