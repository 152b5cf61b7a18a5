"""The layers that a plan may quantize: every linear and convolution layer that really runs."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from calibrator.families.model import OpenVLA

Stage = Literal["vision", "projector", "language", "head"]

# Layers with the same input that inference engines fuse into one kernel must share a format.
_FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


@dataclass(frozen=True)
class Unit:
    """One quantizable layer: its tensor name without `.weight`, its module, and the group that shares its format."""

    name: str
    module: nn.Linear | nn.Conv2d
    stage: Stage
    group: str

    @property
    def params(self) -> int:
        """Number of weights, without the bias."""
        return self.module.weight.numel()


def _stage(name: str) -> Stage:
    if name.startswith("vision_backbone."):
        return "vision"
    if name.startswith(("projector.", "proprio_projector.")):
        return "projector"
    return "head" if name.startswith(("language_model.lm_head", "action_head.")) else "language"


def _group(name: str) -> str:
    parent, _, last = name.rpartition(".")
    return f"{parent}.{_FUSED[last]}" if last in _FUSED else name


def live_units(policy: OpenVLA) -> list[Unit]:
    """All live linear and convolution layers in the order in which they run; 426 for OpenVLA-7B."""
    return [
        Unit(name, module, _stage(name), _group(name))
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
