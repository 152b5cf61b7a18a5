"""Where openpi and lerobot differ around the same network; a checkpoint is used as the one that trained it.

The differences are small but not nothing: their two ways to resize an image move actions by up to 0.3 of the
normalised range.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Convention:
    """One code's ways.

    antialiased: images are resized by Pillow's antialiased bilinear filter on uint8; otherwise bilinear, by the four
    nearest pixels, on floats. padding: what surrounds an image that is not square, after scaling to [-1, 1].
    accumulated: times of the integration are summed up in float32; otherwise each is computed, and rounded once.
    padded_state: the state in the prompt is filled up with zeros to the network's width.
    dtype: of the normalisation; a state on the edge of a bin falls to one side by it.
    quantile_epsilon: added to q99 - q01; None adds nothing and takes 1e-8 for a range that is zero.
    forward_epsilon, backward_epsilon: added to the standard deviation where it divides, and where it multiplies.
    """

    name: str
    antialiased: bool
    padding: float
    accumulated: bool
    padded_state: bool
    dtype: str
    quantile_epsilon: float | None
    forward_epsilon: float
    backward_epsilon: float

    def times(self, steps: int) -> np.ndarray:
        """float32 [N]: where the velocity is evaluated, from 1 (noise) down to 1/N."""
        if not self.accumulated:
            return (1.0 - np.arange(steps) / steps).astype(np.float32)
        times, change = [np.float32(1.0)], np.float32(-1.0 / steps)
        while len(times) < steps:
            times.append(times[-1] + change)
        return np.asarray(times, np.float32)


CONVENTIONS = {
    one.name: one
    for one in (
        Convention("openpi", True, -1.0, True, False, "float64", 1e-6, 1e-6, 1e-6),
        Convention("lerobot", False, -1.0, False, False, "float32", None, 1e-8, 0.0),
        Convention("lerobot_0_4", False, -3.0, False, True, "float32", None, 1e-8, 0.0),
    )
}
