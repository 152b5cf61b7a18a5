"""Policy families, one folder each, found by the `model_type` of a policy's config.json."""

from typing import TYPE_CHECKING, Any

from vla_policy.core import registry
from vla_policy.core.errors import PolicyError

if TYPE_CHECKING:
    from vla_policy.core.families.base import Family


def find_family(model_type: object, source: str) -> "Family[Any]":
    """The family of a `model_type`; `source` names the file in errors. Raises PolicyError naming the known ones."""
    family: Family[Any] | None = registry.find(__name__, model_type, "FAMILY")
    if family is None:
        known = ", ".join(registry.names(__name__))
        raise PolicyError(f"{source}: model_type is {model_type!r}, expected one of: {known}")
    return family
