"""What a name stands for: each policy family and each backend is a folder of its own, found by the folder's name.

Adding one adds a folder; no list names it.
"""

import functools
import importlib
import pkgutil
from typing import Any


def names(package: str) -> tuple[str, ...]:
    """The folders inside a package, sorted. A folder appended to the package's `__path__` adds its own."""
    return _folders(tuple(importlib.import_module(package).__path__))


@functools.cache
def _folders(path: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(found.name for found in pkgutil.iter_modules(path) if found.ispkg))


def find(package: str, name: object, exported: str) -> Any:
    """What the package's folder called `name` exports as `exported`, or None where there is no such folder."""
    if name not in names(package):
        return None
    return getattr(importlib.import_module(f"{package}.{name}"), exported)
