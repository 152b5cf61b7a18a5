"""Mix-QVLA's losses by hooks, plain sums and loops: the oracle of the sweep, for any policy."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from calibrator.modules.prismatic import Prismatic
from calibrator.quantizers import quantized
from calibrator.sensitivity.evidence import BOUNDARIES, EPSILON
from calibrator.sensitivity.sweep import Sweep
from vla_policy.core.formats import Choice

# What float32 leaves of a loss, to compare with `naive_losses`. Evidence is a product of an activation and a gradient,
# each off by about 1e-6 of its size after some 40 layers there and back, those near zero by more of their own. In the
# mass, a sum of thousands, this nearly cancels: 2e-5 of ln M at the most (1e-6 is seen). The divergence grows as the
# square of a shift d, its error as twice the shift's: of d = 0.003 (8 bits, a divergence of 1e-6) a thousandth.
MASS = {"rtol": 2e-3, "atol": 2e-5}
ATTRIBUTION = {"rtol": 2e-3, "atol": 1e-7}

Pass = Callable[[Prismatic, int], Tensor]
"""J of one state (given by its number), with a graph, through the policy's own modules."""


def naive_points(policy: Prismatic, index: int, objective_of: Pass) -> dict[str, Tensor]:
    """The four boundaries of one state with their gradients of J."""
    points: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        tensor.retain_grad()
        points[name] = tensor

    model = policy.decoder
    handles = [
        policy.vision_backbone.register_forward_hook(lambda _m, _a, out: keep("vision", out)),
        policy.projector.register_forward_hook(lambda _m, _a, out: keep("projector", out)),
        model.layers[-1].register_forward_pre_hook(lambda _m, args: keep("language", args[0])),
        model.norm.register_forward_hook(lambda _m, _a, out: keep("head", out)),
    ]
    try:
        objective_of(policy, index).backward()
    finally:
        for handle in handles:
            handle.remove()
    return points


def naive_losses(
    sweep: Sweep, unit: str, choice: Choice, objective_of: Pass, head: slice
) -> list[list[tuple[float, float]]]:
    """(mass, attribution) distortion per state and boundary of Eqs. (3) to (7), with loops over elements.

    head: the positions of the final norm's output that the head reads.
    """
    policy = sweep.policy
    assert isinstance(policy, Prismatic)
    policy.requires_grad_(True)  # so that a graph exists from the pixels on, as in a plain implementation
    try:
        full, changed = [], []
        for index in range(len(sweep.states)):
            full.append(naive_points(policy, index, objective_of))
            with quantized(policy, unit, choice):
                changed.append(naive_points(policy, index, objective_of))
    finally:
        policy.requires_grad_(False)
    result: list[list[tuple[float, float]]] = [[] for _ in full]
    for name in BOUNDARIES:
        crop = head if name == "head" else slice(None)
        rows = torch.cat([item[name].detach()[0, crop] for item in full]).double()
        mean, deviation = rows.mean(0), rows.std(0)
        for sample, (before, after) in enumerate(zip(full, changed, strict=True)):
            evidence = []
            for item in (before, after):
                gradient = item[name].grad
                assert gradient is not None
                hidden, gradient = item[name].detach()[0, crop].double(), gradient[0, crop].double()
                normalised = (hidden - mean) / (deviation + 1e-6)
                evidence.append((normalised * gradient * (deviation + 1e-6)).abs().flatten().tolist())
            result[sample].append(compare(*evidence))
    return result


def compare(before: list[float], after: list[float]) -> tuple[float, float]:
    """Eqs. (5) to (7) with plain sums."""
    mass = abs(math.log((sum(after) / len(after) + EPSILON) / (sum(before) / len(before) + EPSILON)))
    p = [value + EPSILON for value in before]
    q = [value + EPSILON for value in after]
    p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
    divergence = 0.0
    for one, other in zip(p, q, strict=True):
        middle = (one + other) / 2
        divergence += one / 2 * math.log(one / middle) + other / 2 * math.log(other / middle)
    return mass, divergence
