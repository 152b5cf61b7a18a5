"""The OpenVLA family on current torch and transformers: no remote code, no torchvision, no timm."""

from calibrator.policy.actor import TorchActor
from calibrator.policy.decisions import Decisions, decisions_of
from calibrator.policy.loading import load_policy, save_policy
from calibrator.policy.model import Inputs, OpenVLA
from calibrator.policy.oft import OpenVLAOFT
from calibrator.policy.units import Unit, live_units

__all__ = [
    "Decisions",
    "Inputs",
    "OpenVLA",
    "OpenVLAOFT",
    "TorchActor",
    "Unit",
    "decisions_of",
    "live_units",
    "load_policy",
    "save_policy",
]
