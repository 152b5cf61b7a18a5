"""Rounding: weights to codes and scales, activations as engines round them.

A rounding method is one module in `methods`; nothing else has to know of it.
"""

from calibrator.quantizers.activations import InputScale, InputScales
from calibrator.quantizers.apply import find_layer, quantize_policy, quantized
from calibrator.quantizers.base import Codes, LayerStatistics, WeightQuantizer
from calibrator.quantizers.choices import find_method, parse_choice, parse_choices, parse_recipe
from calibrator.quantizers.compute import Computed, needs_statistics, operator_bits, quantize, turns_inputs
from calibrator.quantizers.weights import QuantizedWeight, groups_per_row

__all__ = [
    "Codes",
    "Computed",
    "InputScale",
    "InputScales",
    "LayerStatistics",
    "QuantizedWeight",
    "WeightQuantizer",
    "find_layer",
    "find_method",
    "groups_per_row",
    "needs_statistics",
    "operator_bits",
    "parse_choice",
    "parse_choices",
    "parse_recipe",
    "quantize",
    "quantize_policy",
    "quantized",
    "turns_inputs",
]
