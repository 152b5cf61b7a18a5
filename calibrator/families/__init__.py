"""Policy families on current torch and transformers: no remote code, no torchvision, no timm. One folder each."""

from calibrator.families.actor import TorchActor
from calibrator.families.base import Decisions, Family, find_family
from calibrator.families.loading import empty_policy, load_policy, save_policy
from calibrator.families.units import Unit, live_units
from calibrator.modules.policy import Inputs, Policy

__all__ = [
    "Decisions",
    "Family",
    "Inputs",
    "Policy",
    "TorchActor",
    "Unit",
    "empty_policy",
    "find_family",
    "live_units",
    "load_policy",
    "save_policy",
]
