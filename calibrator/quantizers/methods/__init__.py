"""Rounding methods, one module each, with a `QUANTIZER` of protocol `WeightQuantizer`; found by the module's name."""
