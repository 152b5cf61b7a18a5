"""QuantVLA's corrections (arXiv:2602.20309): what rounding does to an action expert's attention on average is undone.

Rounded are the language model and the expert's MLPs; its attention, vision and the head keep 16 bits. Their drift shows
in the expert's attention, which is corrected by factors that fold into the weights that are not rounded:

    temperature (ATM)   alpha_h = mean std(L_T) / mean std(L_Q)    of head h, into its rows of the query projection
    balance (OHB)       beta_l  = mean rms(Z_T) / mean rms(Z_Q)    of layer l, into its output projection

L are the attention's logits of all query-key pairs, Z its output; T is the policy as it is, Q as it is rounded, both
from the same states and noises. Means are over states and denoising steps, which share a factor. As in the published
code (the text divides) both multiply, come from one uncorrected run, are clipped, and are 1 where they are close to it.
Layers are rounded with its rotation of inputs, which is the rounding method `quantvla`. Its static activation scales
per channel are left out: no integer kernel can run them, and the text rounds per token, as is done here.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from calibrator.data.calibration import CalibrationSet
from calibrator.families import Policy, TorchActor, live_units
from calibrator.modules.gemma import Attention
from calibrator.quantizers import Computed, parse_choice, quantized
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.formats import Choice, Parameter

_TEMPERATURES, _NEUTRAL_TEMPERATURE = (0.7, 1.4), 0.02
_LOG_BALANCE, _NEUTRAL_LOG_BALANCE = 0.30, 0.03
_BEGIN, _END = 0.25, 0.75
"""Parts of a trajectory from which there must be states: drift measured on an idle robot is another one."""


def rounded_layers(policy: Policy) -> list[str]:
    """The layers that QuantVLA rounds: of the language model, and of the expert all but its attention."""
    kept = tuple(f"{path}." for path in policy.action_attention())
    return [unit.name for unit in live_units(policy) if unit.stage == "language" and not unit.name.startswith(kept)]


def temperatures(wanted: Tensor, rounded: Tensor) -> Tensor:
    """alpha [heads], of mean standard deviations of the logits."""
    factors = (wanted / rounded).clamp(*_TEMPERATURES)
    return torch.where((factors - 1).abs() < _NEUTRAL_TEMPERATURE, 1.0, factors)


def balance(wanted: Tensor, rounded: Tensor) -> Tensor:
    """beta, of mean root mean squares of the outputs."""
    logs = (wanted / rounded).log().clamp(-_LOG_BALANCE, _LOG_BALANCE)
    return torch.where(logs.abs() < _NEUTRAL_LOG_BALANCE, 0.0, logs).exp()


@torch.no_grad()
def correct(attention: Attention, alpha: Tensor, beta: Tensor) -> None:
    """Folds a factor per head into the queries, and one into the output; neither has a bias."""
    attention.q_proj.weight.unflatten(0, (len(alpha), -1)).mul_(alpha.to(attention.q_proj.weight)[:, None, None])
    attention.o_proj.weight.mul_(beta.to(attention.o_proj.weight))


class _Seen:
    """An attention's statistics over all of its calls: std of the logits per head, rms of the output; float64 sums."""

    def __init__(self) -> None:
        self.logits = torch.zeros((), dtype=torch.float64)
        self.output = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def see(self, attention: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        x, turn, key = arguments[:3]
        logits = attention.logits(x, turn, key).double()
        self.logits = self.logits + logits.flatten(2).std(-1).mean(0).cpu()
        self.output = self.output + output.double().square().mean().sqrt().cpu()


@dataclass(frozen=True)
class QuantVla:
    """See the module. weight_bits, activation_bits, group: what layers are rounded to; group 0 is one scale per output.
    rotated: whether with the rotation, or to nearest. temperature, balance: whether each correction is made."""

    version: int = 2
    defaults: Mapping[str, Parameter] = field(
        default_factory=lambda: {
            "weight_bits": 4, "activation_bits": 8, "group": 64, "rotated": True, "temperature": True, "balance": True,
        }
    )  # fmt: skip

    def apply(
        self, actor: TorchActor, states: CalibrationSet, parameters: Mapping[str, Parameter], source: str
    ) -> str:
        choice = _choice(parameters)
        attentions = actor.policy.action_attention()
        if not attentions:
            raise PolicyError("quantvla corrects the attention of an action expert; this policy has none")
        first, last = states.progress.min(), states.progress.max()
        if first > _BEGIN or last < _END:
            raise ArtefactError(
                f"{source}: its states lie between {first:.2f} and {last:.2f} of their trajectories (0 to 1); quantvla "
                "measures whole ones: collect more states"
            )
        with _watched(attentions) as wanted:
            _decide(actor, states, "as it is")
        names = rounded_layers(actor.policy)
        codes = Computed()
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(quantized(actor.policy, name, choice, codes))
            seen = stack.enter_context(_watched(attentions))
            _decide(actor, states, f"{choice}")
        alphas, betas = [], []
        for name, attention in attentions.items():
            alpha = temperatures(wanted[name].logits, seen[name].logits)
            beta = balance(wanted[name].output, seen[name].output)
            alphas.append(alpha if parameters["temperature"] else torch.ones_like(alpha))
            betas.append(beta if parameters["balance"] else torch.ones_like(beta))
            correct(attention, alphas[-1], betas[-1])
        return f"{_told('temperature', 'heads', torch.cat(alphas))}, {_told('balance', 'layers', torch.stack(betas))}"


def _choice(parameters: Mapping[str, Parameter]) -> Choice:
    """What layers are rounded to."""
    group = f"_g{parameters['group']}" if parameters["group"] else ""
    method = "quantvla" if parameters["rotated"] else "rtn"
    return parse_choice(f"w{parameters['weight_bits']}a{parameters['activation_bits']}{group}:{method}")


def _told(what: str, of: str, factors: Tensor) -> str:
    changed = int((factors != 1).sum())
    return f"{what} of {changed} of {len(factors)} {of} corrected ({factors.min():.3f} to {factors.max():.3f})"


def _decide(actor: TorchActor, states: CalibrationSet, what: str) -> None:
    for index in tqdm(range(len(states)), desc=f"attention, {what}", unit="state", disable=None):
        actor.act(states.observation(index))


@contextmanager
def _watched(attentions: Mapping[str, Attention]) -> Iterator[dict[str, _Seen]]:
    """Inside the block, what the attentions do is added up by their path."""
    seen = {name: _Seen() for name in attentions}
    handles = [module.register_forward_hook(seen[name].see) for name, module in attentions.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


TRANSFORM = QuantVla()
