"""Typed access to a YAML mapping, with errors that name the file and the key, and what a misspelt key may mean."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml

from vla_policy.core.errors import ContractError

T = TypeVar("T")
D = TypeVar("D")
C = TypeVar("C", bound=str)
_REQUIRED = object()
BLANK = "<fill in>"
"""Stands in a draft for what a person has to say."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the later one would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {repeated!r} stands twice in one mapping", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _blanks(content: Any, where: str) -> Iterator[str]:
    """The places of everything that is still blank."""
    if content == BLANK:
        yield where
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _blanks(value, f"{where}.{key}" if where else str(key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from _blanks(value, f"{where}[{index}]")


def meant(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` where a known name is spelt nearly so, else nothing."""
    near = get_close_matches(name, list(known), 1, 0.7)
    return f"; did you mean {near[0]!r}?" if near else ""


def read_yaml(path: Path | str) -> Any:
    """What the YAML file holds. Raises ContractError when it cannot be read, or a key stands twice in a mapping."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ContractError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ContractError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error


class Fields:
    """One mapping of a YAML file; every key must be read exactly by name, and none may be left over."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise ContractError(f"{where}: expected a mapping, got {type(content).__name__}")
        self.where = where
        self._rest: dict[Any, Any] = dict(content)
        self._asked: list[str] = []

    @staticmethod
    def load(path: Path | str, kind: str, schema_version: int = 1) -> "Fields":
        """The mapping in the YAML file at `path`. Raises ContractError when it cannot be read or is of another kind."""
        content = read_yaml(path)
        if blanks := list(_blanks(content, "")):
            raise ContractError(f"{path}: {len(blanks)} blanks to fill in: {', '.join(blanks)}")
        fields = Fields(content, str(path))
        got = (fields.take("kind", str, ""), fields.take("schema_version", int, 0))
        if got != (kind, schema_version):
            raise ContractError(f"{path}: expected kind {kind!r} version {schema_version}, got {got[0]!r} {got[1]}")
        return fields

    def take(self, key: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """The value of `key` as `kind`; an int is accepted where a float is wanted."""
        self._asked.append(key)
        if key not in self._rest:
            if default is _REQUIRED:
                misspelt = get_close_matches(key, list(map(str, self._rest)), 1, 0.7)
                hint = f"; is {misspelt[0]!r} meant to be it?" if misspelt else ""
                raise ContractError(f"{self.where}: missing key {key!r} ({kind.__name__}){hint}")
            return default
        value = self._rest.pop(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            quoted = "; YAML takes that word for a boolean: quote it" if kind is str and isinstance(value, bool) else ""
            raise ContractError(f"{self.where}: {key}: expected {kind.__name__}, got {value!r}{quoted}")
        return value

    @overload
    def finite(self, key: str) -> float: ...
    @overload
    def finite(self, key: str, default: D) -> float | D: ...
    def finite(self, key: str, default: Any = _REQUIRED) -> Any:
        """A number that is neither infinite nor NaN, or the default."""
        value = self.take(key, float, default)
        if value is not default and not isfinite(value):
            raise ContractError(f"{self.where}: {key}: expected a finite number, got {value}")
        return value

    @overload
    def positive(self, key: str) -> float: ...
    @overload
    def positive(self, key: str, default: D) -> float | D: ...
    def positive(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite number above zero, or the default."""
        value = self.take(key, float, default)
        if value is not default and not 0 < value < float("inf"):
            raise ContractError(f"{self.where}: {key}: expected a number above 0, got {value}")
        return value

    def choice(self, key: str, allowed: tuple[C, ...], default: Any = _REQUIRED) -> C:
        """A string that must be one of `allowed`."""
        value = self.take(key, str, default)
        if value not in allowed:
            raise ContractError(f"{self.where}: {key}: expected one of {', '.join(allowed)}, got {value!r}")
        return allowed[allowed.index(value)]

    def texts(self, key: str, default: Any = _REQUIRED) -> tuple[str, ...]:
        """A list of strings."""
        values = self.take(key, list, default)
        if not all(isinstance(value, str) for value in values):
            raise ContractError(f"{self.where}: {key}: expected a list of str, got {values!r}")
        return tuple(values)

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
            unknown, *others = sorted(map(str, self._rest))
            hint = meant(unknown, self._asked) or f"; known: {', '.join(sorted(self._asked))}"
            raise ContractError(f"{self.where}: unknown key(s) {', '.join((unknown, *others))}{hint}")
