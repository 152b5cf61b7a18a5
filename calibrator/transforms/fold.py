"""Factors folded into a policy: what makes an output divides by them, the weights that read it multiply.

Factors are rounded to powers of two, at most a factor of 1.41 from what the method chose. Multiplication by a power of
two is exact in every floating-point format, so the folded policy computes the same numbers, also once its weights are
stored in bfloat16: what a transform changes is what rounding does to it, and nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from calibrator.data.calibration import CalibrationSet
from calibrator.data.statistics import input_statistics, portions
from calibrator.families import Policy, TorchActor
from calibrator.quantizers import LayerStatistics
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.formats import Parameter


class ChannelScaling(ABC):
    """A transform that leaves the policy what it is: a factor per input channel of layers that read one output.

    needs_second_moments: whether it looks at E[x x^T]. after_layers: whether it also scales what follows a layer, and
    not a norm alone.
    """

    needs_second_moments: bool
    after_layers: bool

    @abstractmethod
    def factors(
        self, statistics: LayerStatistics, weights: Sequence[Tensor], parameters: Mapping[str, Parameter]
    ) -> Tensor:
        """float32 [in], above zero: what the input's channels are divided by and the weights' columns multiplied with.

        statistics: of the input that all layers share. weights: [out, in] of each.
        """

    def apply(
        self, actor: TorchActor, states: CalibrationSet, parameters: Mapping[str, Parameter], source: str
    ) -> str:
        """See `Transform`."""
        folds = folds_of(actor.policy, self.after_layers)
        for share in portions(folds, lambda one: one.layers[one.first]):
            names = [one.first for one in share]
            # What is folded leaves the inputs of all other folds as they are.
            found = input_statistics(actor, states, names, source, self.needs_second_moments)
            for one in tqdm(share, desc="transform", unit="fold", disable=None):
                fold(one, self, parameters, found[one.first])
        return f"folded into {len(folds)} norms and layers; the policy computes the same in 16 bits"


def exact(factors: Tensor) -> Tensor:
    """The nearest powers of two: multiplication by them is exact in every floating-point format."""
    return factors.log2().round().exp2()


@dataclass(frozen=True)
class Fold:
    """A norm or a linear layer, and the layers by name that read its output, which nothing else does."""

    source: nn.Module
    layers: Mapping[str, nn.Linear]

    @property
    def first(self) -> str:
        """The layer whose input stands for that of all."""
        return next(iter(self.layers))


def folds_of(policy: Policy, after_layers: bool = False) -> list[Fold]:
    """Everywhere in the policy that factors can be folded into a norm and, if asked for, into a layer.

    Raises PolicyError for a family that names none.
    """
    found = []
    for layers in (layers for segment in policy.chain().segments for layers in segment.layers):
        parent = policy.get_submodule(layers.path)
        for source, readers in {**layers.after_norms, **(layers.after_layers if after_layers else {})}.items():
            modules = {f"{layers.path}.{path}": parent.get_submodule(path) for path in readers}
            linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
            assert len(linear) == len(readers), f"{layers.path}: {readers} are not all linear layers"
            found.append(Fold(parent.get_submodule(source), linear))
    if not found:
        raise PolicyError("no layer of this policy's family is known to follow a norm; there is nothing to fold into")
    return found


@torch.no_grad()
def fold(one: Fold, method: ChannelScaling, parameters: Mapping[str, Parameter], statistics: LayerStatistics) -> None:
    """Transforms the policy in place. statistics: of the first layer's input. Raises ArtefactError for factors that are
    not finite and above zero."""
    weights = [layer.weight for layer in one.layers.values()]
    factors = method.factors(statistics, weights, parameters)
    if not bool((factors.isfinite() & (factors > 0)).all()):
        raise ArtefactError(f"{one.first}: its factors are not finite and above zero; collect other states")
    _fold(one.source, weights, exact(factors).to(weights[0].dtype))


def _fold(source: nn.Module, weights: Sequence[Tensor], factors: Tensor) -> None:
    for name in ("weight", "bias"):
        parameter = getattr(source, name, None)
        if parameter is not None:
            # Of a linear layer's weight, the rows are its outputs.
            parameter.div_(factors[:, None] if parameter.dim() == 2 else factors)
    for weight in weights:
        weight.mul_(factors)
