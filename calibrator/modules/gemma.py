"""Gemma blocks of a prefix and of an expert that attends the prefix's keys and values layer by layer.

Parameter names are the published checkpoints'. The prefix's last block is read through its keys and values alone, so
the rest of it is not built. The expert's norms are scaled, shifted and gated by the time (adaRMS) where a policy is
conditioned so; otherwise they are Gemma's own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_policy.core.flow.config import RMS_NORM_EPS, ROPE_THETA, GemmaSpec

FUSED = {f"self_attn.{part}_proj": "self_attn.qkv" for part in "qkv"} | {
    f"mlp.{part}_proj": "mlp.gate_up" for part in ("gate", "up")
}
"""Layers of one input, and what the fused layer is called."""


def rotation(positions: Tensor, head_dim: int) -> Tensor:
    """Cosine and sine of every position [.., T]: float32 [2, .., T, head_dim]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * ROPE_THETA**-exponents
    return torch.stack([torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin)])


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """[B, heads, T, d]: x cos + (-x2, x1) sin, halves."""
    first, second = x.chunk(2, -1)
    cosine, sine = (part.unsqueeze(-3).to(x.dtype) for part in turn)
    return x * cosine + torch.cat([-second, first], -1) * sine


def rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps), in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_NORM_EPS)


class RmsNorm(nn.Module):
    """Gemma's: times 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (rms(x) * (1.0 + self.weight.float())).to(x.dtype)

    def modulation(self) -> "Modulation":
        """The same norm as one that is modulated alike at all times."""
        scale = self.weight.float()[None, None]
        return Modulation(scale, torch.zeros_like(scale), torch.ones_like(scale))


class AdaptiveRmsNorm(nn.Module):
    """adaRMS: what `dense` makes of the time is scale, shift and gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)


@dataclass(frozen=True)
class Modulation:
    """Of one norm at one time: [B or 1, 1, width] each."""

    scale: Tensor
    shift: Tensor
    gate: Tensor

    @staticmethod
    def of(row: Tensor) -> "Modulation":
        """row: [B or 1, 3, width]."""
        return Modulation(*(part[:, None] for part in row.unbind(1)))

    def normed(self, x: Tensor) -> Tensor:
        return (rms(x) * (1.0 + self.scale) + self.shift).to(x.dtype)


class Attention(nn.Module):
    """Query, key and value of a block's own positions. whole: False for one whose keys and values alone are read."""

    def __init__(self, spec: GemmaSpec, whole: bool = True) -> None:
        super().__init__()
        self.spec = spec
        if whole:
            self.q_proj = nn.Linear(spec.hidden_size, spec.query_width, bias=False)
            self.o_proj = nn.Linear(spec.query_width, spec.hidden_size, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, spec.key_width, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, spec.key_width, bias=False)

    def keys_values(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """[B, kv heads, T, d] each, keys turned."""
        return rotated(self._heads(self.k_proj(x)), turn), self._heads(self.v_proj(x))

    def forward(self, x: Tensor, turn: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, hidden] of T positions that attend all of `key` and `value` [B, kv heads, T', d].

        mask: [B, 1, 1, T'], added to the scores, where it is not None.
        """
        query = self._queries(x, turn)
        mixed = functional.scaled_dot_product_attention(query, key, value, mask)
        return self.o_proj(mixed.reshape(len(x), -1, x.shape[1], self.spec.head_dim).transpose(1, 2).flatten(2))

    def logits(self, x: Tensor, turn: Tensor, key: Tensor) -> Tensor:
        """What the softmax is taken of, without a mask: [B, heads, T, T']."""
        products = self._queries(x, turn) @ key.mT * self.spec.head_dim**-0.5
        return products.unflatten(2, (-1, x.shape[1])).flatten(1, 2)

    def _queries(self, x: Tensor, turn: Tensor) -> Tensor:
        """[B, kv heads, heads of one T, d]: heads that share keys are further positions of one, nothing is repeated."""
        query = rotated(self._heads(self.q_proj(x)), turn)
        return query.unflatten(1, (self.spec.num_key_value_heads, -1)).flatten(2, 3)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.spec.head_dim)).transpose(1, 2)


class Mlp(nn.Module):
    """down(gelu(gate) up), GELU by its tanh formula."""

    def __init__(self, spec: GemmaSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class PrefixBlock(nn.Module):
    """A block of the prefix. whole: False for the last, of which only keys and values are ever read."""

    def __init__(self, spec: GemmaSpec, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.input_layernorm = RmsNorm(spec.hidden_size)
        self.self_attn = Attention(spec, whole)
        if whole:
            self.post_attention_layernorm = RmsNorm(spec.hidden_size)
            self.mlp = Mlp(spec)

    def forward(self, x: Tensor, turn: Tensor, mask: Tensor | None = None) -> tuple[Tensor | None, Tensor, Tensor]:
        """[B, T, hidden] of all positions, which see each other, and their keys and values."""
        normed = self.input_layernorm(x)
        key, value = self.self_attn.keys_values(normed, turn)
        if not self.whole:
            return None, key, value
        x = x + self.self_attn(normed, turn, key, value, mask)
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


def _expert_norm(width: int, adaptive: bool) -> Any:
    """Of either kind: who reaches into an expert's norms knows which policy it is."""
    return AdaptiveRmsNorm(width) if adaptive else RmsNorm(width)


def modulation(norm: AdaptiveRmsNorm | RmsNorm, row: Tensor | None) -> Modulation:
    """Of a norm of the expert. row: [B or 1, 3, width] of one that the time modulates, else None."""
    if isinstance(norm, RmsNorm):
        return norm.modulation()
    assert row is not None, "adaRMS needs the time"
    return Modulation.of(row)


class ExpertBlock(nn.Module):
    """A block of the expert: its positions see the prefix and each other, but for those that a mask hides."""

    def __init__(self, spec: GemmaSpec, adaptive: bool) -> None:
        super().__init__()
        self.input_layernorm = _expert_norm(spec.hidden_size, adaptive)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = _expert_norm(spec.hidden_size, adaptive)
        self.mlp = Mlp(spec)

    def forward(
        self,
        x: Tensor,
        turn: Tensor,
        cache: tuple[Tensor, Tensor],
        modulations: Tensor | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """cache: the prefix's keys and values of this layer. modulations: [B or 1, 2, 3, width], of both norms, where
        the time modulates them."""
        rows = (None, None) if modulations is None else modulations.unbind(1)
        before, behind = map(modulation, (self.input_layernorm, self.post_attention_layernorm), rows)
        normed = before.normed(x)
        key, value = (
            torch.cat(parts, 2) for parts in zip(cache, self.self_attn.keys_values(normed, turn), strict=True)
        )
        x = x + before.gate.to(x.dtype) * self.self_attn(normed, turn, key, value, mask)
        return x + behind.gate.to(x.dtype) * self.mlp(behind.normed(x))


class GemmaStack(nn.Module):
    """The prefix's blocks, under the published name."""

    def __init__(self, spec: GemmaSpec) -> None:
        super().__init__()
        last = spec.num_hidden_layers - 1
        self.layers = nn.ModuleList(PrefixBlock(spec, number < last) for number in range(spec.num_hidden_layers))


class ExpertStack(nn.Module):
    """The expert's blocks and final norm, under the published name."""

    def __init__(self, spec: GemmaSpec, adaptive: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ExpertBlock(spec, adaptive) for _ in range(spec.num_hidden_layers))
        self.norm = _expert_norm(spec.hidden_size, adaptive)
