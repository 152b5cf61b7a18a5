"""Changes of a policy before it is rounded: equivalent forms that are easier to round, and corrections of what rounding
does."""

# ruff: noqa: F401 - what is imported here are the package's names

from calibrator.transforms.base import Transform, find_transform, parse_transform, transform_names
from calibrator.transforms.fold import ChannelScaling, Fold, fold, folds_of
