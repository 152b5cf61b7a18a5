"""`exported.json`: what an engine was compiled from, tensor by tensor, and which of it stands in the compiled files.

Export is deterministic, so that the policy and the plan give these hashes again, anywhere. That the compiled file holds
a tensor is known where its bytes stand there; the builder may merge others or keep them in a form of its own, and of
those the record says so. The manifest has the hash of this file and of the compiled ones.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import onnx

from engine_build.backends.base import Place
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import read_json, write_json

EXPORTED = "exported.json"
KIND = "exported"
_VERSION = 1


@dataclass(frozen=True)
class Tensor:
    """One stored tensor of a graph. found: whether its bytes stand in the compiled file."""

    sha256: str
    bytes: int
    found: bool


@dataclass(frozen=True)
class Exported:
    """One graph. sha256: of the graph without the contents of its tensors, in which nodes and shapes are."""

    sha256: str
    tensors: Mapping[str, Tensor]


def describe(graph: Path, found: Collection[str]) -> Exported:
    """The graph at `graph`, as it was written. found: tensors that stand in what was compiled from it."""
    model = onnx.load(str(graph), load_external_data=False)
    tensors = {}
    for tensor in model.graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        if external:
            with open(graph.parent / external["location"], "rb") as stream:
                stream.seek(int(external["offset"]))
                content = stream.read(int(external["length"]))
        else:
            content = tensor.raw_data
        tensors[tensor.name] = Tensor(hashlib.sha256(content).hexdigest(), len(content), tensor.name in found)
        tensor.ClearField("raw_data")
    return Exported(hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(), tensors)


def save(folder: Path, places: Mapping[str, Place], graphs: Mapping[str, Exported]) -> None:
    """Writes the record into an engine's folder. places: of the layers in the graphs."""
    content = {
        "graphs": {name: asdict(graph) for name, graph in graphs.items()},
        "places": {name: asdict(place) for name, place in places.items()},
    }
    write_json(folder / EXPORTED, {"schema_version": _VERSION, "kind": KIND, **content})


def load(folder: Path) -> tuple[dict[str, Place], dict[str, Exported]]:
    """The record in an engine's folder. Raises ArtefactError for one that is damaged or of another version."""
    content = read_json(folder / EXPORTED, KIND, _VERSION)
    try:
        places = {name: Place(**place) for name, place in content["places"].items()}
        return places, {
            name: Exported(graph["sha256"], {key: Tensor(**value) for key, value in graph["tensors"].items()})
            for name, graph in content["graphs"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"{folder / EXPORTED}: entry {error} is missing or malformed; build the engine again"
        ) from error


def check_same(folder: Path, recorded: Mapping[str, Exported], now: Mapping[str, Exported]) -> None:
    """Raises ArtefactError naming the first tensor, or graph, that is not as policy and plan give it, or is not in the
    compiled file any more."""
    for name, graph in now.items():
        was = recorded.get(name, Exported("", {}))
        differing = [key for key, tensor in graph.tensors.items() if was.tensors.get(key) != tensor]
        differing += sorted(was.tensors.keys() - graph.tensors.keys())
        if not differing and was.sha256 != graph.sha256:
            differing = [f"the graph of {name}"]
        if differing:
            more = f" and {len(differing) - 1} more tensors" if len(differing) > 1 else ""
            raise ArtefactError(
                f"{folder}: {differing[0]}{more} of graph {name}: not as policy and plan give them, or not in the "
                "engine as when it was built; altered, or written by another version: build it again"
            )


def check_exported(folder: Path, recorded: Mapping[str, Exported], now: Mapping[str, Exported]) -> None:
    """`check_same` for what was exported alone: what was not compiled yet stands nowhere."""

    def bare(graphs: Mapping[str, Exported]) -> dict[str, Exported]:
        return {
            name: replace(graph, tensors={key: replace(one, found=False) for key, one in graph.tensors.items()})
            for name, graph in graphs.items()
        }

    check_same(folder, bare(recorded), bare(now))


def summary(graphs: Mapping[str, Exported]) -> str:
    """In words, how much of what was exported stands in the compiled files."""
    tensors = [tensor for graph in graphs.values() for tensor in graph.tensors.values()]
    found = [tensor for tensor in tensors if tensor.found]
    return (
        f"{len(found)} of {len(tensors)} tensors, {sum(tensor.bytes for tensor in found):,} of "
        f"{sum(tensor.bytes for tensor in tensors):,} bytes, stand in the compiled files byte for byte"
    )
