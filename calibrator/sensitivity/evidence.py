"""Task evidence at the four functional boundaries of a policy: Mix-QVLA Eqs. (3) to (8).

Z = (H - mean) / (deviation + eps) and dJ/dZ = (deviation + eps) dJ/dH, so in E = |Z * dJ/dZ| the deviation cancels
and E = |(H - mean) * dJ/dH| for any eps: only the mean per channel is ever needed.

Losses are summed in float64: a bit-width that changes almost nothing must not drown in rounding.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BOUNDARIES = ("vision", "projector", "language", "head")
"""The paper's nu, beta, psi, alpha: vision features, projector output, a late decoder block's input, head input."""

EPSILON = 1e-12
"""Eqs. (6), (7). Evidence is small (a gradient of a mean log-probability per activation), so eps must be smaller."""

JS_BOUND = math.log(2.0)


@dataclass(frozen=True)
class Profile:
    """One boundary's evidence reduced to what the losses compare.

    mass: float64 [B], M of Eq. (5). attribution: float64 [B, elements], a of Eq. (7), each row summing to 1.
    """

    mass: Tensor
    attribution: Tensor


def evidence_map(hidden: Tensor, mean: Tensor, gradient: Tensor) -> Tensor:
    """E of Eq. (4), float32 [B, tokens, channels].

    hidden, gradient: H and dJ/dH [B, tokens, channels]; mean: [channels], full precision, over the calibration set.
    """
    return ((hidden.float() - mean.float()) * gradient.float()).abs()


def profile(evidence: Tensor, epsilon: float = EPSILON) -> Profile:
    """Eqs. (5) and (7) of an evidence map [B, tokens, channels], over all its tokens and channels."""
    flat = evidence.flatten(1).double()
    raised = flat + epsilon
    return Profile(flat.mean(1), raised / raised.sum(1, keepdim=True))


def mass_distortion(reference: Profile, changed: Profile, epsilon: float = EPSILON) -> Tensor:
    """Delta^mass of Eq. (6), float64 [B]: |log((M' + eps) / (M + eps))|."""
    return ((changed.mass + epsilon) / (reference.mass + epsilon)).log().abs()


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Delta^attr of Eq. (7), float64 [B] in [0, ln 2]: Jensen-Shannon divergence of the rows of p and q [B, n].

    With s = p + q and d = (p - q) / s it equals sum s/4 [(1 + d) ln(1 + d) + (1 - d) ln(1 - d)]: no term is negative,
    so nearly equal profiles keep their digits and equal ones give exactly 0.
    """
    total = p + q
    shift = (p - q) / total
    terms = torch.xlogy(1 + shift, 1 + shift) + torch.xlogy(1 - shift, 1 - shift)
    # A term below 1e-16 may round to -1e-16; the divergence itself cannot be negative.
    return (total * terms).sum(1).div(4).clamp(0.0, JS_BOUND)
