"""The OpenVLA family on current torch and transformers: no remote code, no torchvision, no timm."""

from calibrator.families.actor import TorchActor
from calibrator.families.decisions import Decisions, decisions_of
from calibrator.families.loading import load_policy, save_policy
from calibrator.families.model import Inputs, OpenVLA
from calibrator.families.oft import OpenVLAOFT
from calibrator.families.units import Unit, live_units

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
