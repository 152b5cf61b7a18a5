"""Rounding methods by name, and choices from text."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from calibrator.quantizers.base import WeightQuantizer
from calibrator.quantizers.weights import code_range
from vla_policy.core import registry
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION, Choice, Format, Parameter, Recipe

_METHODS = "calibrator.quantizers.methods"
USUAL_METHOD = "mse"
_RECIPE = re.compile(r"(\w+)(?:\((.*)\))?")


def method_names() -> tuple[str, ...]:
    """The names of all rounding methods."""
    return registry.names(_METHODS, modules=True)


def find_method(name: str) -> WeightQuantizer:
    """The method called `name`. Raises ArtefactError naming the choices."""
    found: WeightQuantizer | None = registry.find(_METHODS, name, "QUANTIZER", modules=True)
    if found is None:
        raise ArtefactError(f"rounding method {name!r} is unknown; choose one of: {', '.join(method_names())}")
    return found


def parse_choice(text: str) -> Choice:
    """From e.g. `w16a16`, `w4a16_g64:rtn`, `w3a16_g64:mse(steps=40)`; without a recipe, weights are
    rounded by `USUAL_METHOD`.

    Raises ArtefactError for a format, method or parameter that does not exist, PolicyError for bits that have no codes.
    """
    name, separator, recipe = text.partition(":")
    fmt = Format.parse(name)
    if fmt.weight_bits >= FULL_PRECISION.weight_bits:
        return Choice(fmt, parse_recipe(text, recipe, find_method) if separator else None)
    code_range(fmt.weight_bits)
    if fmt.group_size is not None and fmt.group_size < 2:
        raise ArtefactError(f"choice {text!r}: a group needs at least 2 inputs; leave _g{fmt.group_size} out for rows")
    return Choice(fmt, parse_recipe(text, recipe or USUAL_METHOD, find_method))


def parse_choices(texts: Iterable[str]) -> tuple[Choice, ...]:
    """From several texts, the least precise first."""
    return tuple(sorted(map(parse_choice, texts), key=lambda choice: choice.precision))


class Method(Protocol):
    """What a recipe needs to know of the method that it names."""

    @property
    def version(self) -> int: ...

    @property
    def defaults(self) -> Mapping[str, Parameter]: ...


def parse_recipe(text: str, recipe: str, find: Callable[[str], Method]) -> Recipe:
    """From e.g. `mse(steps=40)`, which stands in `text`. Raises ArtefactError for parameters that the method lacks, and
    as `find` does."""
    match = _RECIPE.fullmatch(recipe)
    if match is None:
        raise ArtefactError(f"choice {text!r}: recipe {recipe!r} is malformed; expected e.g. rtn or mse(steps=40)")
    name, inside = match.groups()
    method = find(name)
    given: dict[str, Parameter] = {}
    for item in inside.split(",") if inside else []:
        key, _, value = item.partition("=")
        given[key.strip()] = _value(text, method, key.strip(), value)
    other = {key: value for key, value in given.items() if value != method.defaults[key]}
    return Recipe(name, method.version, tuple(sorted(other.items())))


def _value(text: str, method: Method, key: str, value: str) -> Parameter:
    if key not in method.defaults:
        known = ", ".join(f"{name}={json.dumps(usual)}" for name, usual in method.defaults.items()) or "none"
        raise ArtefactError(f"choice {text!r}: there is no parameter {key!r}; known, with their defaults: {known}")
    usual = method.defaults[key]
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = None
    if isinstance(usual, float) and type(parsed) is int:
        parsed = float(parsed)
    if type(parsed) is not type(usual):
        raise ArtefactError(f"choice {text!r}: {key}={value} is no {type(usual).__name__}, e.g. {json.dumps(usual)}")
    result: Parameter = parsed
    return result
