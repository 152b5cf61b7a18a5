"""Equivalent policies that are easier to round: what a layer's input loses in range, its weights gain, and back."""

from calibrator.transforms.base import ChannelScaling, find_transform, parse_transform, transform_names
from calibrator.transforms.fold import Fold, fold, folds_of

__all__ = ["ChannelScaling", "Fold", "find_transform", "fold", "folds_of", "parse_transform", "transform_names"]
