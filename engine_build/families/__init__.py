"""How each policy family becomes graphs: one folder per family, named by its `model_type` as everywhere."""

from typing import TYPE_CHECKING, Any

from vla_policy.core import registry
from vla_policy.core.errors import PolicyError
from vla_policy.core.policy_config import PolicyConfig

if TYPE_CHECKING:
    from engine_build.families.base import Family


def find_family(config: PolicyConfig) -> "Family[Any]":
    """The family of a policy. Raises PolicyError naming those that engines can be built of."""
    model_type = config.raw.get("model_type")
    family: Family[Any] | None = registry.find(__name__, model_type, "FAMILY")
    if family is None:
        known = ", ".join(registry.names(__name__))
        raise PolicyError(f"no engine is built of model_type {model_type!r}; choose a policy of: {known}")
    return family
