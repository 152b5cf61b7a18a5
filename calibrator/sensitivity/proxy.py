"""First-order scores for every layer, bit-width and state from very few passes: no pass per layer.

Quantizing a layer moves its output X by dX = Q(layer)(x) - layer(x), known exactly from one full-precision pass. What
dX does to the policy is estimated to first order:

- the action (QVLA Eq. (6), per output channel): a scalar s moves by at most sum_c ||ds/dX_c|| ||dX_c||, norms over
  tokens. A greedy action is piecewise constant, so its place is taken by the expected action under the model's
  distribution over the action bins. One backward pass per action dimension.
- the evidence mass (Mix-QVLA Eq. (5)): ln M moves by <d ln M / dX, dX>, signed. M holds gradients, so this is a
  backward pass through a backward pass, one per boundary; and a layer between a boundary and the action also changes
  the gradient that it passes back, from x' = X'W to X'Q(W), which adds <d ln M / dx', dx'>.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from calibrator.families import OpenVLA
from calibrator.quantizers.quantization import find_layer, quantize_input, quantize_weight
from calibrator.sensitivity.evidence import BOUNDARIES, evidence_map
from calibrator.sensitivity.passes import run_from_vision, tokens_per_decision
from calibrator.sensitivity.sweep import Sweep
from vla_policy.core.errors import DataError
from vla_policy.core.formats import Format

_KEPT_BYTES = 2 << 30


@dataclass(frozen=True)
class FirstOrder:
    """One layer's estimates by bit-width (in the order of the settings) and state, float64.

    action: [bits, N], QVLA's action error, squared, in the units of the exact one. mass: [bits, N, boundaries], the
    signed change of ln M, whose magnitude estimates Delta^mass of Eq. (6); empty boundaries where not asked for.
    """

    action: np.ndarray
    mass: np.ndarray


def first_order(sweep: Sweep, units: Sequence[str], evidence: bool) -> list[FirstOrder]:
    """Estimates for `units` on every state of the sweep; those of the evidence only if asked for.

    Raises DataError naming the first layer with an estimate that is not finite.
    """
    count, bits = len(sweep.states), sweep.settings.bits
    found = {
        unit: FirstOrder(
            np.zeros((len(bits), count)), np.zeros((len(bits), count, len(BOUNDARIES) if evidence else 0))
        )
        for unit in units
    }
    for samples in sweep.states.split(range(count)):
        columns = list(samples)
        for members in _shares(sweep, units, len(samples)):
            for unit, layer in _tap(sweep, samples, members, evidence).items():
                for row, width in enumerate(bits):
                    action, mass = layer.estimate(sweep.settings.format_of(width))
                    found[unit].action[row, columns] = action.double().cpu()
                    found[unit].mass[row, columns] = mass.double().cpu()
    for unit, estimate in found.items():
        if not (np.isfinite(estimate.action).all() and np.isfinite(estimate.mass).all()):
            raise DataError(
                f"{unit}: its first-order estimate is not finite; if the policy overflows, use --dtype float32, else "
                "check the checkpoint"
            )
    return list(found.values())


def _shares(sweep: Sweep, units: Sequence[str], states: int) -> Iterator[list[str]]:
    """`units` in runs whose kept tensors fit `_KEPT_BYTES`: what a pass keeps must not grow with their number."""
    policy, prompt, decided = sweep.policy, sweep.states.mean_prompt_tokens, sweep.states.decisions.size
    members: list[str] = []
    kept = 0.0
    for unit in units:
        weight = find_layer(policy, unit).weight
        tokens = states * tokens_per_decision(policy.config, unit, prompt, decided)
        # Of input and output each: the values, the gradient, and one slope per boundary.
        size = tokens * (len(weight) + weight[0].numel()) * (2 + len(BOUNDARIES)) * weight.itemsize
        if members and kept + size > _KEPT_BYTES:
            yield members
            members, kept = [], 0.0
        members.append(unit)
        kept += size
    yield members


@dataclass(frozen=True)
class _Layer:
    """What one batch's passes leave of a layer.

    states: B. x: its input. arriving: dJ/dX, or None where no boundary lies behind the layer. action: [B, channels],
    squared norms of the action's gradients, summed over dimensions. forward, backward: per boundary, the gradient of
    ln M with respect to the layer's output and to the gradient that it passes to its input.
    """

    module: nn.Linear | nn.Conv2d
    states: int
    x: Tensor
    arriving: Tensor | None
    action: Tensor
    forward: Sequence[Tensor]
    backward: Sequence[Tensor]

    @torch.no_grad()
    def estimate(self, fmt: Format) -> tuple[Tensor, Tensor]:
        """Squared action error [B] and change of ln M [B, boundaries], float32."""
        weight = self.module.weight
        change = quantize_weight(weight, fmt).dequantize().to(weight.dtype) - weight
        rounded = quantize_input(self.module, self.x, fmt.activation_bits) if fmt.activation_bits < 16 else self.x
        # Q(W)Q(x) - Wx = (Q(W) - W)Q(x) + W(Q(x) - x): differences first, or they drown in the rounding of bfloat16.
        moved = self._apply(rounded, change)
        if rounded is not self.x:
            moved = moved + self._apply(rounded - self.x, weight)
        action = (self.action * moved.square().sum(1)).sum(-1)
        mass = [(slope.float() * moved).sum((1, 2)) for slope in self.forward]
        if self.arriving is not None:
            passed = nn.functional.linear(self.arriving, change.T).float()
            mass = [one + (slope.float() * passed).sum((1, 2)) for one, slope in zip(mass, self.backward, strict=True)]
        return action, torch.stack(mass, dim=1) if mass else action.new_zeros(len(action), 0)

    def _apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        if isinstance(self.module, nn.Conv2d):
            return _token_rows(nn.functional.conv2d(x, matrix, stride=self.module.stride), self.states).float()
        return _token_rows(nn.functional.linear(x, matrix), self.states).float()


def _tap(sweep: Sweep, samples: tuple[int, ...], units: Sequence[str], evidence: bool) -> dict[str, _Layer]:
    """One full-precision pass of a batch and the backward passes through it."""
    policy, batch = sweep.policy, sweep.states.batch(sweep.policy, samples, sweep.reference.decided)
    with ExitStack() as stack:
        inputs, outputs = stack.enter_context(_taps(policy, units))
        stack.enter_context(torch.enable_grad())
        if evidence:
            # Only the plain formula of attention can be differentiated twice.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Weights are constants: the inputs' gradients are what makes every layer's output differentiable.
        vision = policy.vision_backbone(batch.inputs.pixel_values.detach().requires_grad_())
        if batch.inputs.state is not None:
            batch.inputs.state.requires_grad_()
        run = run_from_vision(policy, batch, vision, sweep.block)
        points = [outputs[unit] for unit in units]
        gains = [point.new_zeros((), dtype=torch.float32) for point in points]
        for value in batch.decisions.expected(run.output).unbind(1):
            # Reduced at once: only one dimension's gradients are held at a time.
            rows = _token_rows_of_all(torch.autograd.grad(value.sum(), points, retain_graph=True), len(samples))
            gains = [gain + row.float().square().sum(1) for gain, row in zip(gains, rows, strict=True)]
        arriving: dict[str, Tensor] = {}
        slopes: list[list[Tensor]] = []
        behind = [unit for unit in units if evidence and not unit.startswith("vision_backbone.")]
        if evidence:
            objective = batch.objective(run.output).sum()
            hidden = [run.boundaries[name] for name in BOUNDARIES]
            wanted = [*hidden, *(outputs[unit] for unit in behind), *(inputs[unit] for unit in behind)]
            found = torch.autograd.grad(objective, wanted, create_graph=True)
            gradients, found = found[: len(hidden)], found[len(hidden) :]
            arriving = {unit: gradient.detach() for unit, gradient in zip(behind, found, strict=False)}
            points += found[len(behind) :]
            for name, h, gradient in zip(BOUNDARIES, hidden, gradients, strict=True):
                mass = evidence_map(h, sweep.means[name], gradient).flatten(1).mean(1)
                slopes.append(
                    _token_rows_of_all(
                        torch.autograd.grad(mass.log().sum(), points, retain_graph=True, materialize_grads=True),
                        len(samples),
                    )
                )
    layers = {}
    for index, unit in enumerate(units):
        module = policy.get_submodule(unit)
        assert isinstance(module, nn.Linear | nn.Conv2d)
        layers[unit] = _Layer(
            module,
            len(samples),
            inputs[unit].detach(),
            arriving.get(unit),
            gains[index],
            [slope[index] for slope in slopes],
            [slope[len(units) + behind.index(unit)] for slope in slopes] if unit in arriving else [],
        )
    return layers


@contextmanager
def _taps(policy: OpenVLA, units: Sequence[str]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Inside the block, forward passes fill two dicts with their graph's tensors: inputs and outputs by layer."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in units:

        def enter(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> Tensor:
            # An alias of its own: what arrives there is this layer's gradient alone, even if others share the input.
            inputs[name] = args[0].view_as(args[0])
            return inputs[name]

        def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            outputs[name] = output

        module = policy.get_submodule(name)
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def _token_rows_of_all(tensors: Sequence[Tensor], states: int) -> list[Tensor]:
    return [_token_rows(tensor, states) for tensor in tensors]


def _token_rows(x: Tensor, states: int) -> Tensor:
    """Layer output as [B, tokens of all images, channels]."""
    rows = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
    return rows.reshape(states, -1, rows.shape[-1])
