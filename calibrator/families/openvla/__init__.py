"""OpenVLA: seven action tokens, one after another."""

from calibrator.families.base import Family
from calibrator.families.openvla.decisions import TokenDecisions
from calibrator.families.openvla.model import OpenVLA
from calibrator.modules.prismatic import dead_tensors

FAMILY = Family(build=OpenVLA, dead_tensors=dead_tensors, decisions=TokenDecisions.of)
