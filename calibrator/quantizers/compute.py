"""Codes by a choice's recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from calibrator.quantizers.base import LayerStatistics, Needs, TurnsInputs
from calibrator.quantizers.choices import find_method
from calibrator.quantizers.weights import QuantizedWeight, code_range
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.formats import Choice, Recipe


def quantize(weight: Tensor, choice: Choice, statistics: LayerStatistics | None = None) -> QuantizedWeight:
    """Codes and scales of `weight` [out, ...] in a choice below 16 bits.

    Raises PolicyError for a bit-width without codes and for a weight that is not finite, ArtefactError for a recipe of
    another version than the code's, or that needs statistics and has none.
    """
    recipe = choice.recipe
    assert recipe is not None, choice
    method = find_method(recipe.method)
    if recipe.version != method.version:
        raise ArtefactError(
            f"{choice}: is of version {recipe.version} of {recipe.method}, which is now at {method.version}; "
            "measure and allocate again"
        )
    if method.needs is not Needs.NOTHING and statistics is None:
        raise ArtefactError(f"{choice}: {recipe.method} needs the layer's inputs over a calibration set")
    code_range(choice.format.weight_bits)
    if not bool(weight.isfinite().all()):
        shape = list(weight.shape)
        raise PolicyError(f"weight of shape {shape} is not finite; the checkpoint is damaged: copy it again")
    return method.quantize(weight, choice.format, {**method.defaults, **dict(recipe.parameters)}, statistics)


def needs_statistics(recipe: Recipe | None) -> bool:
    """Whether codes by this recipe depend on the layer's input."""
    return recipe is not None and find_method(recipe.method).needs is not Needs.NOTHING


def needs_guidance(recipe: Recipe | None) -> bool:
    """Whether they depend on what the decision asks of it, too."""
    return recipe is not None and find_method(recipe.method).needs is Needs.GUIDED_INPUTS


def operator_bits(recipe: Recipe, inputs: int) -> int:
    """What the input operator of a layer with so many inputs takes by this recipe; 0 where there is none."""
    method = find_method(recipe.method)
    given = {**method.defaults, **dict(recipe.parameters)}
    return method.operator_bits(inputs, given) if isinstance(method, TurnsInputs) else 0


def turns_inputs(recipe: Recipe) -> bool:
    """Whether codes by this recipe come with an input operator."""
    return isinstance(find_method(recipe.method), TurnsInputs)


@dataclass(frozen=True)
class Computed:
    """Codes that are computed when they are asked for. statistics: by layer, for recipes that need them."""

    statistics: Mapping[str, LayerStatistics] = field(default_factory=dict)

    def of(self, unit: str, weight: Tensor, choice: Choice) -> QuantizedWeight:
        """Raises as `quantize`, naming the layer."""
        try:
            return quantize(weight, choice, self.statistics.get(unit))
        except PolicyError as error:
            raise PolicyError(f"{unit}: {error}") from error
