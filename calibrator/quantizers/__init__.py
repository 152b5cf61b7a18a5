"""Rounding: weights to codes and scales, activations as engines round them.

A rounding method is one module in `methods`; nothing else has to know of it.
"""

# ruff: noqa: F401 - what is imported here are the package's names

from calibrator.quantizers.activations import InputScale, InputScales
from calibrator.quantizers.apply import find_layer, quantize_policy, quantized
from calibrator.quantizers.base import Codes, LayerStatistics, WeightQuantizer
from calibrator.quantizers.choices import find_method, parse_choice, parse_choices, parse_recipe
from calibrator.quantizers.compute import (
    Computed,
    needs_guidance,
    needs_statistics,
    operator_bits,
    quantize,
    turns_inputs,
)
from calibrator.quantizers.weights import QuantizedWeight, groups_per_row
