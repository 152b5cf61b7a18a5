"""Which format each layer of a TensorRT engine has, by TensorRT's own engine inspector, on the GPU of the engine.

An engine that is built with `ProfilingVerbosity.DETAILED` tells of every layer, as JSON, the types of what it reads and
writes, and in its metadata which nodes of the ONNX graph went into it ("[ONNX Layer: name]"). TensorRT 10 calls a type
"Format/Datatype", 11 "DataType"; other keys changed as well, so types are taken wherever they stand in a layer.

A layer whose codes a plugin takes has them as they are, since TensorRT does not understand them; that its node became a
plugin is told as well. Any other layer that was planned with N bits has N bits if integers of N bits come into the
engine's layers that its nodes went into. If they do not, the builder has folded the codes into float16 weights.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_policy.core.errors import ArtefactError

_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_TYPE_KEYS = ("Format/Datatype", "DataType", "Datatype", "Type")
_KIND_KEYS = ("LayerType", "PluginType", "Type")
_INTEGERS = {"int4": 4, "int8": 8}


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine. nodes: of the ONNX graph, that went into it. bits: of the integers that it reads. plugin:
    whether it is one."""

    name: str
    nodes: frozenset[str]
    bits: frozenset[int]
    plugin: bool = False


def parse(information: str, engine: Path) -> list[EngineLayer]:
    """What `get_engine_information` gives as JSON. Raises ArtefactError for anything else."""
    try:
        layers = json.loads(information)["Layers"]
        return [_layer(layer) for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"{engine}: TensorRT's inspector tells no details of its layers ({type(error).__name__}: {error}); build "
            "the engine again"
        ) from error


def _layer(raw: Mapping[str, Any]) -> EngineLayer:
    nodes = _NODE.findall(str(raw.get("Metadata", "")))
    read = {key: value for key, value in raw.items() if key not in ("Name", "Metadata", "Outputs")}
    kinds = " ".join(str(raw.get(key, "")) for key in _KIND_KEYS)
    return EngineLayer(str(raw["Name"]), frozenset(nodes), frozenset(_integers(read)), "plugin" in kinds.lower())


def _integers(value: Any) -> Iterator[int]:
    """Widths of the integer types that are named anywhere in a layer's description."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in _TYPE_KEYS and isinstance(inner, str):
                yield from (bits for name, bits in _INTEGERS.items() if name in inner.lower())
            else:
                yield from _integers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _integers(inner)


def bits_of(layers: list[EngineLayer], nodes: frozenset[str]) -> frozenset[int] | None:
    """Widths of the integers that come into the layers that any of `nodes` went into; None where no layer names one."""
    found = [layer for layer in layers if layer.nodes & nodes]
    return frozenset[int]().union(*(layer.bits for layer in found)) if found else None


def became_plugin(layers: list[EngineLayer], node: str) -> bool:
    """Whether a node of the graph is a plugin in the engine."""
    return any(layer.plugin and node in layer.nodes for layer in layers)
