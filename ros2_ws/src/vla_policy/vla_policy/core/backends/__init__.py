"""What executes an engine's graphs: one folder per backend, found by the name that manifests and targets use."""

from typing import TYPE_CHECKING

from vla_policy.core import registry
from vla_policy.core.errors import ArtefactError

if TYPE_CHECKING:
    from vla_policy.core.backends.base import Backend


def backend_names() -> tuple[str, ...]:
    """Every backend."""
    return registry.names(__name__)


def find_backend(name: str) -> "Backend":
    """The backend called `name`. Raises ArtefactError naming the known ones."""
    backend: Backend | None = registry.find(__name__, name, "BACKEND")
    if backend is None:
        raise ArtefactError(f"backend {name!r} is unknown; choose one of: {', '.join(backend_names())}")
    return backend
