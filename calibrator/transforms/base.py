"""What a transform is: a method that changes a policy's weights before they are rounded."""

from collections.abc import Mapping
from typing import Protocol

from calibrator.data.calibration import CalibrationSet
from calibrator.families import TorchActor
from calibrator.quantizers import parse_recipe
from vla_policy.core import registry
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Parameter, Recipe

_METHODS = "calibrator.transforms.methods"


class Transform(Protocol):
    """A method: `TRANSFORM` of a module in `calibrator.transforms.methods`, called as the module.

    version: goes up whenever some policy becomes another than before. defaults: every parameter's usual value.
    """

    @property
    def version(self) -> int: ...

    @property
    def defaults(self) -> Mapping[str, Parameter]: ...

    def apply(
        self, actor: TorchActor, states: CalibrationSet, parameters: Mapping[str, Parameter], source: str
    ) -> str:
        """Changes the actor's policy in place; returns what was done, for people.

        parameters: all of `defaults`, some with other values. source: what the states are called in messages. Raises
        ArtefactError for states that do not suffice, PolicyError for a policy that it is not for.
        """
        ...


def transform_names() -> tuple[str, ...]:
    """The names of all transforms."""
    return registry.names(_METHODS, modules=True)


def find_transform(name: str) -> Transform:
    """The transform called `name`. Raises ArtefactError naming the choices."""
    found: Transform | None = registry.find(_METHODS, name, "TRANSFORM", modules=True)
    if found is None:
        raise ArtefactError(f"transform {name!r} is unknown; choose one of: {', '.join(transform_names())}")
    return found


def parse_transform(text: str) -> Recipe:
    """From e.g. `smoothquant` or `smoothquant(strength=0.7)`. Raises ArtefactError for what does not exist."""
    return parse_recipe(text, text, find_transform)
