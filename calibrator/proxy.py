"""First-order scores for every layer and bit-width from very few passes: QVLA Eq. (6), per output channel.

For a scalar output s of the policy and the channels c of a layer's output X, a perturbation dX moves s by at most

    sum_c ||ds/dX_c|| ||dX_c||,    dX = Q(layer)(x) - layer(x)

with norms over tokens. QVLA uses it with the action. A greedy action is piecewise constant, so its place is taken by
the expected action under the model's distribution over the action bins, as differentiable as the paper needs it.
One forward pass, one backward pass per action dimension, and each layer once per bit-width: no pass per layer.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from calibrator.passes import Batch
from calibrator.policy import OpenVLA, live_units
from calibrator.quantization import quantize_input, quantize_weight
from calibrator.states import States
from vla_policy.core.actions import ActionCodec
from vla_policy.core.formats import Format


def expected_action(logits: Tensor, codec: ActionCodec) -> Tensor:
    """[B, K]: mean of the normalised action under the distribution over action bins; logits [B, K, vocab]."""
    ids = np.arange(codec.first_token, codec.last_token + 1)
    values = torch.from_numpy(codec.tokens_to_normalised(ids)).to(logits.device, torch.float32)
    return logits[..., codec.first_token : codec.last_token + 1].float().softmax(-1) @ values


def _perturbation(module: nn.Linear | nn.Conv2d, x: Tensor, fmt: Format) -> Tensor:
    """dX: what `fmt` changes in the layer's output, float32."""
    weight = module.weight
    changed = quantize_weight(weight, fmt).dequantize().to(weight.dtype)
    rounded = quantize_input(module, x, fmt.activation_bits) if fmt.activation_bits < 16 else x
    if isinstance(module, nn.Conv2d):
        now, before = (nn.functional.conv2d(v, w, stride=module.stride) for v, w in ((rounded, changed), (x, weight)))
        return (now - before).float().flatten(2).transpose(1, 2)
    return (nn.functional.linear(rounded, changed) - nn.functional.linear(x, weight)).float()


def _token_rows(x: Tensor) -> Tensor:
    """Layer output as [B, tokens, channels]."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def action_proxy(
    policy: OpenVLA, states: States, tokens: np.ndarray, samples: tuple[int, ...], formats: Mapping[int, Format]
) -> dict[str, dict[int, np.ndarray]]:
    """First-order estimate of QVLA's action error, squared, per layer, bit-width and state: float64 [N].

    formats: what each bit-width means. samples: states of equal prompt length. Same units as the exact action error.
    """
    batch = states.batch(policy, samples, tokens)
    inputs, outputs, logits = _tapped_forward(policy, batch)
    names = list(outputs)
    gains = {name: torch.zeros(()) for name in names}
    action = expected_action(logits, states.codec)
    for dimension in range(action.shape[1]):
        retain = dimension + 1 < action.shape[1]
        gradients = torch.autograd.grad(
            action[:, dimension].sum(), [outputs[name] for name in names], retain_graph=retain
        )
        for name, gradient in zip(names, gradients, strict=True):
            gains[name] = gains[name] + _token_rows(gradient).float().square().sum(1)
    result: dict[str, dict[int, np.ndarray]] = {}
    with torch.no_grad():
        for name in names:
            module = policy.get_submodule(name)
            assert isinstance(module, nn.Linear | nn.Conv2d)
            result[name] = {}
            for bits, fmt in formats.items():
                noise = _perturbation(module, inputs[name], fmt).square().sum(1)
                result[name][bits] = (gains[name] * noise).sum(-1).double().cpu().numpy()
    return result


def _tapped_forward(policy: OpenVLA, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Every live layer's input and output in the full-precision pass, outputs with a graph, and the logits."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def tap(name: str) -> torch.utils.hooks.RemovableHandle:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        return policy.get_submodule(name).register_forward_hook(keep)

    handles = [tap(unit.name) for unit in live_units(policy)]
    try:
        with torch.enable_grad():
            # Weights are constants: the pixels' gradient is what makes every layer's output differentiable.
            pixels = batch.pixel_values.detach().requires_grad_()
            logits = policy.action_logits(pixels, batch.input_ids, batch.tokens)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs, logits
