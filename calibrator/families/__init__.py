"""Policy families on current torch and transformers: no remote code, no torchvision, no timm. One folder each."""

# ruff: noqa: F401 - what is imported here are the package's names

from calibrator.families.actor import TorchActor
from calibrator.families.base import Decisions, Family, find_family
from calibrator.families.loading import empty_policy, load_policy, save_policy
from calibrator.families.units import Unit, live_units
from calibrator.modules.policy import Inputs, Policy
