"""What a name stands for: each policy family, backend and rounding method is found by its folder's or module's name.

Adding one adds a folder or module; no list names it.
"""

import functools
import importlib
import pkgutil
from typing import Any


def names(package: str, *, modules: bool = False) -> tuple[str, ...]:
    """The folders, or the modules, inside a package, sorted. What is appended to its `__path__` adds its own."""
    return _inside(tuple(importlib.import_module(package).__path__), modules)


@functools.cache
def _inside(path: tuple[str, ...], modules: bool) -> tuple[str, ...]:
    return tuple(sorted(found.name for found in pkgutil.iter_modules(path) if found.ispkg is not modules))


def find(package: str, name: object, exported: str, *, modules: bool = False) -> Any:
    """What the package's folder (or module) called `name` exports as `exported`; None where there is no such one."""
    if name not in names(package, modules=modules):
        return None
    return getattr(importlib.import_module(f"{package}.{name}"), exported)
