"""The OpenVLA family on current torch and transformers: no remote code, no torchvision, no timm."""

from calibrator.policy.actor import TorchActor
from calibrator.policy.loading import load_policy, save_policy
from calibrator.policy.model import OpenVLA
from calibrator.policy.units import Unit, live_units

__all__ = ["OpenVLA", "TorchActor", "Unit", "live_units", "load_policy", "save_policy"]
