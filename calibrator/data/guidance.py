"""How much a decision depends on each row of a layer's input, for sums that weigh rows.

An error e_t in what a layer makes of row t changes J of Mix-QVLA Eq. (2) by <dJ/dy_t, e_t> to first order. So of every
state its row t weighs

    w_t = (1 - EQUAL) |dJ/dy_t| / sum_s |dJ/dy_s|  +  EQUAL / rows

which is 1 together: a state counts as much as any other, whether its decision was close or so clear that J has next to
no gradient. After GuidedQuant (Kim et al., 2025, arXiv:2505.07004), whose weights are the squares, over all states: in
most language layers of the demo policy 3 % of the rows would then hold nine tenths of all weight, and closed loop
suffers (docs/results.md).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from calibrator.families import TorchActor
from calibrator.modules.chain import DECIDED
from calibrator.modules.taps import taps, token_rows
from calibrator.quantizers.activations import input_rows
from vla_policy.core.observation import Observation, finite

EQUAL = 0.2


def guided_rows(
    actor: TorchActor, state: Observation, layers: Mapping[str, nn.Linear | nn.Conv2d]
) -> tuple[dict[str, tuple[Tensor, Tensor]], bool]:
    """By layer its input while the policy is held to what it decides in this state, float32 [rows, in], and the weights
    of its rows, float64 [rows]; and whether the policy would rather answer something that is no action.

    Raises EngineError unless what it answers is finite.
    """
    inputs = actor.inputs(state)
    decided = actor.policy.decide(inputs, actor.decisions.size)
    chain = actor.policy.chain()
    with taps(layers) as (entering, leaving), torch.enable_grad():
        # Parameters are constants: gradients reach every layer's output from the inputs.
        for value in inputs.values():
            value.requires_grad_(value.is_floating_point())
        output = chain.run({**inputs, DECIDED: decided})[chain.output]
        finite(actor.decisions.scores(output.detach())[0].cpu().numpy(), "torch policy: output")
        firmness = actor.decisions.objective(output, decided).sum()
        flat = [run for name in layers for run in leaving[name]]
        slopes = iter(torch.autograd.grad(firmness, flat, materialize_grads=True))
    found = {}
    for name, layer in layers.items():
        rows = torch.cat([input_rows(layer, run.detach()) for run in entering[name]])
        sizes = torch.cat([token_rows(next(slopes), 1)[0] for _ in leaving[name]]).double().norm(dim=1)
        total = sizes.sum()
        shares = sizes / total if total > 0 else torch.full_like(sizes, 1 / len(sizes))
        found[name] = rows.float(), (1 - EQUAL) * shares + EQUAL / len(rows)
    return found, bool(actor.decisions.strays(output.detach())[0])
