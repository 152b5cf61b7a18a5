"""Factors folded into a policy: the norm before some layers divides by them, the layers' weights multiply.

Factors are rounded to powers of two, at most a factor of 1.41 from what the method chose. Multiplication by a power of
two is exact in every floating-point format, so the folded policy computes the same numbers, also once its weights are
stored in bfloat16: what a transform changes is what rounding does to it, and nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibrator.families import Policy
from calibrator.quantizers import LayerStatistics
from calibrator.transforms.base import find_transform
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.formats import Recipe


@dataclass(frozen=True)
class Fold:
    """A norm, and the layers by name that read its output, which nothing else does."""

    norm: nn.Module
    layers: Mapping[str, nn.Linear]

    @property
    def first(self) -> str:
        """The layer whose input stands for that of all."""
        return next(iter(self.layers))


def folds_of(policy: Policy) -> list[Fold]:
    """Everywhere in the policy that factors can be folded. Raises PolicyError for a family that names none."""
    found = []
    for segment in policy.chain().segments:
        layers = segment.layers
        for norm, readers in layers.after_norms.items() if layers else ():
            assert layers is not None
            parent = policy.get_submodule(layers.path)
            modules = {f"{layers.path}.{path}": parent.get_submodule(path) for path in readers}
            linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
            assert len(linear) == len(readers), f"{layers.path}: {readers} are not all linear layers"
            found.append(Fold(parent.get_submodule(norm), linear))
    if not found:
        raise PolicyError("no layer of this policy's family is known to follow a norm; there is nothing to fold into")
    return found


@torch.no_grad()
def fold_policy(policy: Policy, recipe: Recipe, statistics: Mapping[str, LayerStatistics]) -> int:
    """Transforms the policy in place; returns how many norms took factors. statistics: of every fold's first layer."""
    method = find_transform(recipe.method)
    parameters = dict(method.defaults) | dict(recipe.parameters)
    folds = folds_of(policy)
    for fold in folds:
        weights = [layer.weight for layer in fold.layers.values()]
        factors = _exact(method.factors(statistics[fold.first], weights, parameters), fold.first)
        _fold(fold.norm, weights, factors.to(weights[0].dtype))
    return len(folds)


def _exact(factors: Tensor, layer: str) -> Tensor:
    """The nearest powers of two."""
    if not bool((factors.isfinite() & (factors > 0)).all()):
        raise ArtefactError(f"{layer}: its factors are not finite and above zero; collect other states")
    return factors.log2().round().exp2()


def _fold(norm: nn.Module, weights: Sequence[Tensor], factors: Tensor) -> None:
    for name in ("weight", "bias"):
        parameter = getattr(norm, name, None)
        if parameter is not None:
            parameter.div_(factors)
    for weight in weights:
        weight.mul_(factors)
