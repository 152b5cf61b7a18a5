"""Rounding: weights to codes and scales, activations as engines round them."""
