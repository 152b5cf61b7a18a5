"""Changes of a policy before it is rounded: equivalent forms that are easier to round, and corrections of what rounding
does."""

from calibrator.transforms.base import Transform, find_transform, parse_transform, transform_names
from calibrator.transforms.fold import ChannelScaling, Fold, fold, folds_of

__all__ = [
    "ChannelScaling",
    "Fold",
    "Transform",
    "find_transform",
    "fold",
    "folds_of",
    "parse_transform",
    "transform_names",
]
