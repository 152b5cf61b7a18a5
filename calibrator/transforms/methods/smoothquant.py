"""SmoothQuant (arXiv:2211.10438), Eq. (4): part of the activations' range moves into the weights.

    s_j = max|X_j|^strength / max|W_j|^(1 - strength)

over the calibration set, with the largest weight of column j over all layers that read the input. Strength 0.5 splits
the difficulty evenly, the paper's default; 0.75 suits activations with stronger outliers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calibrator.quantizers import LayerStatistics
from calibrator.transforms.fold import ChannelScaling
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Parameter

_LEAST = 1e-5
"""Of a peak or a column's largest weight, as in the published code: a channel that never moves has a factor, too."""


@dataclass(frozen=True)
class SmoothQuant(ChannelScaling):
    """See the module. strength: the paper's alpha, in [0, 1]."""

    version: int = 1
    defaults: Mapping[str, Parameter] = field(default_factory=lambda: {"strength": 0.5})
    needs_second_moments: bool = False
    after_layers: bool = False

    def factors(
        self, statistics: LayerStatistics, weights: Sequence[Tensor], parameters: Mapping[str, Parameter]
    ) -> Tensor:
        strength = float(parameters["strength"])
        if not 0 <= strength <= 1:
            raise ArtefactError(f"smoothquant: strength {strength}: expected a number from 0 to 1")
        columns = torch.stack([weight.detach().float().abs().amax(0) for weight in weights]).amax(0)
        peaks = statistics.peaks.to(columns.device).clamp_min(_LEAST)
        return peaks.pow(strength) / columns.clamp_min(_LEAST).pow(1 - strength)


TRANSFORM = SmoothQuant()
