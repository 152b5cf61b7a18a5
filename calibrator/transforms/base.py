"""What a transform is: a factor per input channel of layers that read one norm's output, chosen by a method."""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from calibrator.quantizers import LayerStatistics, parse_recipe
from calibrator.transforms import methods
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Parameter, Recipe


class ChannelScaling(Protocol):
    """A method: `TRANSFORM` of a module in `calibrator.transforms.methods`, called as the module.

    version: goes up whenever some policy gets other factors than before. defaults: every parameter's usual value.
    """

    @property
    def version(self) -> int: ...

    @property
    def defaults(self) -> Mapping[str, Parameter]: ...

    def factors(
        self, statistics: LayerStatistics, weights: Sequence[Tensor], parameters: Mapping[str, Parameter]
    ) -> Tensor:
        """float32 [in], above zero: what the input's channels are divided by and the weights' columns multiplied with.

        statistics: of the input that all layers share. weights: [out, in] of each.
        """
        ...


def transform_names() -> list[str]:
    """The names of all transforms."""
    return sorted(module.name for module in pkgutil.iter_modules(methods.__path__))


def find_transform(name: str) -> ChannelScaling:
    """The transform called `name`. Raises ArtefactError naming the choices."""
    if name not in transform_names():
        raise ArtefactError(f"transform {name!r} is unknown; choose one of: {', '.join(transform_names())}")
    found: ChannelScaling = importlib.import_module(f"{methods.__name__}.{name}").TRANSFORM
    return found


def parse_transform(text: str) -> Recipe:
    """From e.g. `smoothquant` or `smoothquant(strength=0.7)`. Raises ArtefactError for what does not exist."""
    return parse_recipe(text, text, find_transform)
