"""OpenVLA-OFT: a chunk of continuous actions in one pass."""

from calibrator.families.base import Family
from calibrator.families.openvla_oft.decisions import ChunkDecisions
from calibrator.families.openvla_oft.model import OpenVLAOFT
from calibrator.modules import prismatic
from vla_policy.core.families.openvla_oft import OftConfig


def dead_tensors(config: OftConfig) -> dict[str, tuple[int, ...]]:
    """The towers', and the base policy's head over words."""
    head = (config.text.vocab_size, config.text.hidden_size)
    return {**prismatic.dead_tensors(config), "language_model.lm_head.weight": head}


FAMILY = Family(build=OpenVLAOFT, dead_tensors=dead_tensors, decisions=ChunkDecisions.of)
