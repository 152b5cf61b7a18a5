"""Equivalent policies that are easier to round: what a layer's input loses in range, its weights gain, and back."""

from calibrator.transforms.base import ChannelScaling, find_transform, parse_transform, transform_names
from calibrator.transforms.fold import fold_policy

__all__ = ["ChannelScaling", "find_transform", "fold_policy", "parse_transform", "transform_names"]
