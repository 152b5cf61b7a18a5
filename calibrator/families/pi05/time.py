"""What depends on the time alone: computed once per step, a table in engines."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vla_policy.core.flow.config import FlowConfig

EXPERT = "paligemma_with_expert.gemma_expert.model"


def expert_norms(config: FlowConfig) -> list[str]:
    """The names of the expert's norms in the order in which they run; the final one is the last."""
    norms = [
        f"{EXPERT}.layers.{number}.{norm}"
        for number in range(config.expert.num_hidden_layers)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    return [*norms, f"{EXPERT}.norm"]


def embedding(times: Tensor, config: FlowConfig) -> Tensor:
    """float32 [M, width] of times [M] in [0, 1]: sine and cosine of 2 pi t / period, computed in float64."""
    half = config.expert.hidden_size // 2
    shares = torch.linspace(0, 1, half, dtype=torch.float64, device=times.device)
    periods = config.min_period * (config.max_period / config.min_period) ** shares
    angles = times.double()[:, None] * (2 * np.pi / periods)
    return torch.cat([angles.sin(), angles.cos()], -1).float()


def condition(tensor: Callable[[str], Tensor], times: Tensor, config: FlowConfig) -> Tensor:
    """[M, width]: what all norms are modulated by. tensor: a weight by its name."""

    def dense(x: Tensor, name: str) -> Tensor:
        weight, bias = tensor(f"{name}.weight"), tensor(f"{name}.bias")
        return functional.silu(functional.linear(x.to(weight.dtype), weight, bias))

    return dense(dense(embedding(times, config), "time_mlp_in"), "time_mlp_out")


def modulations(tensor: Callable[[str], Tensor], times: Tensor, config: FlowConfig) -> Tensor:
    """[M, norms, 3, width]: scale, shift and gate of every norm, in the order of `expert_norms`.

    tensor: a weight by its name.
    """
    cond = condition(tensor, times, config)
    rows = [
        functional.linear(cond, tensor(f"{norm}.dense.weight"), tensor(f"{norm}.dense.bias"))
        for norm in expert_norms(config)
    ]
    return torch.stack(rows, 1).unflatten(2, (3, -1))
