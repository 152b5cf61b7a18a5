"""What a transform is: a factor per input channel of layers that read one output, chosen by a method."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from calibrator.quantizers import LayerStatistics, parse_recipe
from vla_policy.core import registry
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Parameter, Recipe

_METHODS = "calibrator.transforms.methods"


class ChannelScaling(Protocol):
    """A method: `TRANSFORM` of a module in `calibrator.transforms.methods`, called as the module.

    version: goes up whenever some policy gets other factors than before. defaults: every parameter's usual value.
    needs_second_moments: whether it looks at E[x x^T]. after_layers: whether it also scales what follows a layer, and
    not a norm alone.
    """

    @property
    def version(self) -> int: ...

    @property
    def defaults(self) -> Mapping[str, Parameter]: ...

    @property
    def needs_second_moments(self) -> bool: ...

    @property
    def after_layers(self) -> bool: ...

    def factors(
        self, statistics: LayerStatistics, weights: Sequence[Tensor], parameters: Mapping[str, Parameter]
    ) -> Tensor:
        """float32 [in], above zero: what the input's channels are divided by and the weights' columns multiplied with.

        statistics: of the input that all layers share. weights: [out, in] of each.
        """
        ...


def exact(factors: Tensor) -> Tensor:
    """The nearest powers of two: multiplication by them is exact in every floating-point format."""
    return factors.log2().round().exp2()


def transform_names() -> tuple[str, ...]:
    """The names of all transforms."""
    return registry.names(_METHODS, modules=True)


def find_transform(name: str) -> ChannelScaling:
    """The transform called `name`. Raises ArtefactError naming the choices."""
    found: ChannelScaling | None = registry.find(_METHODS, name, "TRANSFORM", modules=True)
    if found is None:
        raise ArtefactError(f"transform {name!r} is unknown; choose one of: {', '.join(transform_names())}")
    return found


def parse_transform(text: str) -> Recipe:
    """From e.g. `smoothquant` or `smoothquant(strength=0.7)`. Raises ArtefactError for what does not exist."""
    return parse_recipe(text, text, find_transform)
