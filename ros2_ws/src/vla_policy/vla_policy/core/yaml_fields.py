"""Typed access to a YAML mapping, with errors that name the file and the key."""

from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vla_policy.core.errors import ContractError

T = TypeVar("T")
_REQUIRED = object()


class Fields:
    """One mapping of a YAML file; every key must be read exactly by name, and none may be left over."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise ContractError(f"{where}: expected a mapping, got {type(content).__name__}")
        self.where = where
        self._rest: dict[Any, Any] = dict(content)

    @staticmethod
    def load(path: Path | str, kind: str, schema_version: int = 1) -> "Fields":
        """The mapping in the YAML file at `path`. Raises ContractError when it cannot be read or is of another kind."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ContractError(f"{path}: cannot be read ({error.strerror}); check the path") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ContractError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
        fields = Fields(content, str(path))
        got = (fields.take("kind", str, ""), fields.take("schema_version", int, 0))
        if got != (kind, schema_version):
            raise ContractError(f"{path}: expected kind {kind!r} version {schema_version}, got {got[0]!r} {got[1]}")
        return fields

    def take(self, key: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """The value of `key` as `kind`; an int is accepted where a float is wanted."""
        value = self._rest.pop(key, default)
        if value is _REQUIRED:
            raise ContractError(f"{self.where}: missing key {key!r} ({kind.__name__})")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise ContractError(f"{self.where}: {key}: expected {kind.__name__}, got {value!r}")
        return value

    def finite(self, key: str, default: Any = _REQUIRED) -> float:
        """A number that is neither infinite nor NaN."""
        value = self.take(key, float, default)
        if not isfinite(value):
            raise ContractError(f"{self.where}: {key}: expected a finite number, got {value}")
        return value

    def positive(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number above zero."""
        value = self.take(key, float, default)
        if not 0 < value < float("inf"):
            raise ContractError(f"{self.where}: {key}: expected a number above 0, got {value}")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: Any = _REQUIRED) -> str:
        """A string that must be one of `allowed`."""
        value = self.take(key, str, default)
        if value not in allowed:
            raise ContractError(f"{self.where}: {key}: expected one of {', '.join(allowed)}, got {value!r}")
        return value

    def mapping(self, key: str, default: Any = _REQUIRED) -> "Fields":
        """The mapping under `key`."""
        return Fields(self.take(key, dict, default), f"{self.where}: {key}")

    def sequence(self, key: str, default: Any = _REQUIRED) -> Iterator["Fields"]:
        """The mappings of the list under `key`."""
        for index, item in enumerate(self.take(key, list, default)):
            yield Fields(item, f"{self.where}: {key}[{index}]")

    def end(self) -> None:
        """Raises ContractError for keys that nobody asked for: a misspelt key must not be ignored."""
        if self._rest:
            raise ContractError(f"{self.where}: unknown key(s) {', '.join(sorted(map(str, self._rest)))}")
