"""What turns a policy's graphs into something that a target runs: one folder per backend, named as on the robot."""

from typing import TYPE_CHECKING

from vla_policy.core import registry
from vla_policy.core.errors import ArtefactError

if TYPE_CHECKING:
    from engine_build.backends.base import Backend


def find_backend(name: str) -> "Backend":
    """The backend called `name`. Raises ArtefactError naming the known ones."""
    backend: Backend | None = registry.find(__name__, name, "BACKEND")
    if backend is None:
        known = ", ".join(registry.names(__name__))
        raise ArtefactError(f"backend {name!r} builds nothing here; choose one of: {known}")
    return backend


def runs_here(name: str) -> bool:
    """Whether what the backend called `name` needs is installed, and able to run on this machine."""
    try:
        return bool(find_backend(name).version())
    except ArtefactError:
        return False
