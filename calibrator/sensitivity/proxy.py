"""First-order scores for every layer, choice and state from very few passes: no pass per layer.

Quantizing a layer moves its output X by dX = Q(layer)(x) - layer(x), known exactly from one full-precision pass. What
dX does to the policy is estimated to first order:

- the action (QVLA Eq. (6), per output channel): a scalar s moves by at most sum_c ||ds/dX_c|| ||dX_c||, norms over
  tokens. A greedy action is piecewise constant, so its place is taken by the expected action under the model's
  distribution over the action bins. One backward pass per value of the action or, of many, per random probe: the
  squared gradients along directions of random signs have the sum over all values as their mean (Hutchinson).
- the evidence mass (Mix-QVLA Eq. (5)): ln M moves by <d ln M / dX, dX>, signed. M holds gradients, so this is a
  backward pass through a backward pass, one per boundary; and a layer between a boundary and the action also changes
  the gradient that it passes back, from x' = X'W to X'Q(W), which adds <d ln M / dx', dx'>.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from calibrator.families import Unit
from calibrator.modules.taps import taps, token_rows
from calibrator.quantizers.activations import quantize_input
from calibrator.sensitivity.evidence import BOUNDARIES, evidence_map
from calibrator.sensitivity.passes import Batch
from calibrator.sensitivity.sweep import Sweep
from vla_policy.core.errors import DataError
from vla_policy.core.formats import FULL_PRECISION, Choice

_KEPT_BYTES = 2 << 30
_FLOAT_BYTES = 4
_MOST_VALUES, _PROBES = 16, 8

Runs = Mapping[str, Sequence[Tensor]]
"""Tensors by layer, one for each of its runs in a pass."""


@dataclass(frozen=True)
class FirstOrder:
    """One layer's estimates by choice (in the order of the settings) and state, float64.

    action: [choices, N], QVLA's action error, squared, in the units of the exact one. mass: [choices, N, boundaries],
    the signed change of ln M, whose magnitude estimates Delta^mass of Eq. (6); empty boundaries where not asked for.
    """

    action: np.ndarray
    mass: np.ndarray


@dataclass(frozen=True)
class FirstOrderTask:
    """Estimates of some layers on states of equal shapes, as `first_order` gives them."""

    units: tuple[str, ...]
    samples: tuple[int, ...]
    evidence: bool

    def __str__(self) -> str:
        return f"first-order estimates on {len(self.samples)} states"

    def __call__(self, sweep: Sweep) -> tuple["FirstOrderTask", dict[str, FirstOrder]]:
        return self, _of_batch(sweep, self.units, self.samples, self.evidence)


def first_order(sweep: Sweep, units: Sequence[str], evidence: bool) -> list[FirstOrder]:
    """Estimates for `units` on every state of the sweep; those of the evidence only if asked for."""
    batches = sweep.states.split(range(len(sweep.states)), alike=True)
    found = [_of_batch(sweep, units, batch, evidence) for batch in batches]
    order = np.argsort(np.concatenate(batches))
    return [
        FirstOrder(
            np.concatenate([batch[unit].action for batch in found], 1)[:, order],
            np.concatenate([batch[unit].mass for batch in found], 1)[:, order],
        )
        for unit in units
    ]


def channel_errors(sweep: Sweep, units: Sequence[str], done: Callable[[int], None]) -> dict[str, np.ndarray]:
    """QVLA's first-order action error of every output channel, float64 [widths, channels], the mean over all states.

    By layer; the first width is 0 bits, the others are the sweep's choices. done: hears of states.
    """
    sums: dict[str, np.ndarray] = {}
    for batch in sweep.states.split(range(len(sweep.states)), alike=True):
        for share in _shares(sweep, units, len(batch)):
            for name, layer in _pass(sweep, batch, share, evidence=False).items():
                weight = layer.module.weight.detach().float()
                coded = [torch.zeros_like(weight)]
                coded += [sweep.coded(name, weight, choice) for choice in sweep.settings.choices]
                found = [layer.channels(values - weight).double().sum(0).cpu().numpy() for values in coded]
                sums[name] = sums.get(name, 0.0) + np.stack(found)
        done(len(batch))
    for name, total in sums.items():
        if not np.isfinite(total).all():
            raise DataError(f"{name}: its first-order estimate is not finite; check the checkpoint")
    return {name: sums[name] / len(sweep.states) for name in units}


def _of_batch(sweep: Sweep, units: Sequence[str], samples: tuple[int, ...], evidence: bool) -> dict[str, FirstOrder]:
    """Estimates by layer on states of equal shapes.

    Raises DataError naming the first layer with an estimate that is not finite.
    """
    found: dict[str, FirstOrder] = {}
    for share in _shares(sweep, units, len(samples)):
        for unit, layer in _pass(sweep, samples, share, evidence).items():
            pairs = [layer.estimate(choice, sweep) for choice in sweep.settings.choices]
            action, mass = (np.stack([one.double().cpu().numpy() for one in kind]) for kind in zip(*pairs, strict=True))
            found[unit] = FirstOrder(action, mass)
    for unit, estimate in found.items():
        if not (np.isfinite(estimate.action).all() and np.isfinite(estimate.mass).all()):
            raise DataError(f"{unit}: its first-order estimate is not finite; check the checkpoint")
    return found


def _shares(sweep: Sweep, names: Sequence[str], states: int) -> Iterator[list[Unit]]:
    """The layers in shares whose kept tensors fit `_KEPT_BYTES`: what a pass keeps must not grow with their number."""
    share: list[Unit] = []
    kept = 0.0
    for unit in (sweep.units[name] for name in names):
        weight = unit.module.weight
        tokens = states * unit.tokens(sweep.states.mean_prompt_tokens, sweep.states.decisions.size)
        # Of input and output each: the values, the gradient, and one slope per boundary.
        size = tokens * (len(weight) + weight[0].numel()) * (2 + len(BOUNDARIES)) * _FLOAT_BYTES
        if share and kept + size > _KEPT_BYTES:
            yield share
            share, kept = [], 0.0
        share.append(unit)
        kept += size
    yield share


@dataclass(frozen=True)
class _Backward:
    """How the mass depends on the gradient that a layer passes back.

    arriving: dJ/dX, of the layer's output. slopes: per boundary, the gradient of ln M with respect to dJ/dx', of its
    input.
    """

    arriving: Tensor
    slopes: Sequence[Tensor]


@dataclass(frozen=True)
class _Layer:
    """What one batch's passes leave of a layer.

    A layer that runs several times in a pass has the tokens of all runs, one after the other.

    states: B. x: its input. action: [B, channels], squared norms of the action's gradients, summed over dimensions.
    forward: per boundary, the gradient of ln M with respect to the layer's output. backward: None where no boundary
    lies before the layer.
    """

    unit: str
    module: nn.Linear | nn.Conv2d
    states: int
    x: Tensor
    action: Tensor
    forward: Sequence[Tensor]
    backward: _Backward | None

    @torch.no_grad()
    def channels(self, change: Tensor) -> Tensor:
        """Squared action error [B, channels], float32, of every output channel alone with its weights so changed."""
        return self.action * self._apply(self.x, change).square().sum(1)

    @torch.no_grad()
    def estimate(self, choice: Choice, sweep: Sweep) -> tuple[Tensor, Tensor]:
        """Squared action error [B] and change of ln M [B, boundaries], float32; codes and rounding are the sweep's."""
        weight, x, operator = self.module.weight.float(), self.x, None
        coded = weight
        if choice.recipe is not None:
            found = sweep.codes.of(self.unit, weight, choice)
            coded, operator = found.dequantize(), found.operator
        if operator is not None:
            # The layer as it is in the operator's channels: the same product.
            weight = operator.weight(weight.flatten(1).double()).float().reshape(weight.shape)
            x = quantize_input(self.module, x, FULL_PRECISION, operator=operator)
        change = coded - weight
        rounded = quantize_input(self.module, x, choice.format, sweep.scale(self.unit, choice))
        # Q(W)Q(x) - Wx = (Q(W) - W)Q(x) + W(Q(x) - x): differences first, or they drown in rounding.
        moved = self._apply(rounded, change)
        if rounded is not x:
            moved = moved + self._apply(rounded - x, weight)
        action = (self.action * moved.square().sum(1)).sum(-1)
        mass = [(slope.float() * moved).sum((1, 2)) for slope in self.forward]
        if self.backward is not None:
            passed = nn.functional.linear(self.backward.arriving, change.T).float()
            passed = passed if operator is None else operator.back(passed)
            turned = [(slope.float() * passed).sum((1, 2)) for slope in self.backward.slopes]
            mass = [one + other for one, other in zip(mass, turned, strict=True)]
        return action, torch.stack(mass, dim=1) if mass else action.new_zeros(len(action), 0)

    def _apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        if isinstance(self.module, nn.Conv2d):
            return token_rows(nn.functional.conv2d(x, matrix, stride=self.module.stride), self.states).float()
        return token_rows(nn.functional.linear(x, matrix), self.states).float()


def _pass(sweep: Sweep, samples: tuple[int, ...], units: Sequence[Unit], evidence: bool) -> dict[str, _Layer]:
    """One full-precision pass of a batch and the backward passes through it: what they leave of `units`."""
    batch = sweep.states.batch(sweep.policy, samples, sweep.reference.decided)
    with ExitStack() as stack:
        inputs, outputs = stack.enter_context(taps({unit.name: unit.module for unit in units}))
        stack.enter_context(torch.enable_grad())
        if evidence:
            # Only the plain formula of attention can be differentiated twice.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Weights are constants: the inputs' gradients are what makes every layer's output differentiable.
        for value in batch.inputs.values():
            value.requires_grad_(value.is_floating_point())
        values = sweep.chain.run(batch.values)
        action = _action_gains(batch, values[sweep.chain.output], outputs)
        forward, backward = _mass_slopes(sweep, batch, values, units, inputs, outputs) if evidence else ({}, {})
    return {
        unit.name: _Layer(
            unit.name,
            unit.module,
            len(samples),
            _joined_input(unit.module, inputs[unit.name], len(samples)),
            action[unit.name],
            forward.get(unit.name, ()),
            backward.get(unit.name),
        )
        for unit in units
    }


def _joined_input(module: nn.Module, runs: Sequence[Tensor], states: int) -> Tensor:
    """All runs' input; a convolution's images as they are, for it runs once."""
    return runs[0].detach() if isinstance(module, nn.Conv2d) else _joined(runs, states).detach()


def _joined(runs: Sequence[Tensor], states: int) -> Tensor:
    """[B, tokens of all runs, channels]."""
    return torch.cat([token_rows(run, states) for run in runs], 1)


def directions(values: int) -> Tensor:
    """float32 [R, D]: the squared gradients along the R directions sum up to those of the D values, for many values in
    the mean."""
    if values <= _MOST_VALUES:
        return torch.eye(values)
    signs = torch.randint(0, 2, (_PROBES, values), generator=torch.Generator().manual_seed(0))
    return (2.0 * signs - 1.0) / _PROBES**0.5


def _action_gains(batch: Batch, output: Tensor, outputs: Runs) -> dict[str, Tensor]:
    """Per layer [B, channels]: squared norms over tokens of the action's gradients, summed over dimensions."""
    states = len(batch.samples)
    gains: dict[str, Tensor] = {}
    expected = batch.decisions.expected(output)
    for direction in directions(expected.shape[1]).to(expected.device):
        # Reduced at once: only one direction's gradients are held at a time.
        (found,) = _gradients((expected @ direction).sum(), outputs)
        for unit, gradients in found.items():
            gain = _joined(gradients, states).float().square().sum(1)
            gains[unit] = gains[unit] + gain if unit in gains else gain
    return gains


def _mass_slopes(
    sweep: Sweep,
    batch: Batch,
    values: Mapping[str, Tensor],
    units: Sequence[Unit],
    inputs: Runs,
    outputs: Runs,
) -> tuple[dict[str, list[Tensor]], dict[str, _Backward]]:
    """`_Layer.forward` and `_Layer.backward` by layer. values: of the chain. inputs, outputs: of the layers."""
    states, chain = len(batch.samples), sweep.chain
    trunk = {segment.name for segment in chain.trunk}
    behind = [unit.name for unit in units if unit.segment in trunk]
    hidden = {boundary: values[name] for boundary, name in chain.boundaries.items()}
    # A factor to differentiate by: without it a gradient that no activation changes would be a constant to autograd.
    objective = batch.objective(values[chain.output])
    at_boundary, arriving, passed = _gradients(
        (objective * objective.new_ones(()).requires_grad_()).sum(),
        {boundary: [h] for boundary, h in hidden.items()},
        {unit: outputs[unit] for unit in behind},
        {unit: inputs[unit] for unit in behind},
        create_graph=True,
    )
    forward: dict[str, list[Tensor]] = {unit.name: [] for unit in units}
    backward: dict[str, list[Tensor]] = {unit: [] for unit in behind}
    for boundary, h in hidden.items():
        mass = evidence_map(h, sweep.means[boundary], at_boundary[boundary][0]).flatten(1).mean(1)
        slopes = _gradients(mass.log().sum(), outputs, passed)
        for known, found in zip((forward, backward), slopes, strict=True):
            for unit, slope in found.items():
                known[unit].append(_joined(slope, states))
    return forward, {
        unit: _Backward(_joined(arriving[unit], states).detach(), slopes) for unit, slopes in backward.items()
    }


def _gradients(of: Tensor, *points: Runs, create_graph: bool = False) -> list[dict[str, list[Tensor]]]:
    """The gradients of `of` with respect to all points, under the points' names; zero where it does not depend."""
    flat = [tensor for group in points for runs in group.values() for tensor in runs]
    found = iter(torch.autograd.grad(of, flat, retain_graph=True, create_graph=create_graph, materialize_grads=True))
    return [{name: [next(found) for _ in runs] for name, runs in group.items()} for group in points]
