"""From written graphs to what runs, read back: the part of a build that a device does, without policy and torch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx

from engine_build import exported
from engine_build.backends.base import Backend, Layer, ReadBack, Realised, Written, canonical
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Choice, Format
from vla_policy.core.manifest import UnitRecord
from vla_policy.core.program import GraphSpec
from vla_policy.core.targets import Target

PACKED = "not compiled: `python -m engine_build prove` does that on the device"
"""A note of packed engines."""


def compile_graphs(
    written: Written,
    target: Target,
    replaced: Path,
    layers: Mapping[str, Layer],
    planned: Mapping[str, Format],
    backend: Backend,
) -> tuple[dict[str, GraphSpec], dict[str, ReadBack]]:
    """The graphs as the engine holds them, in the folder of the written ones, and what they became. Raises
    ArtefactError as `Backend.compile` and `Backend.read_back`."""
    graphs = backend.compile(written, target, replaced)
    built = {name: written.folder / spec.file for name, spec in graphs.items()}
    return graphs, read_back(written, built, layers, planned, backend, written.folder)


@contextmanager
def linked(written: Written, folder: Path) -> Iterator[Written]:
    """The same graphs in another folder, where they can be compiled; their files are links, which go at the end."""
    names = [name for spec in written.graphs.values() for name in (spec.file, f"{Path(spec.file).stem}.data")]
    for name in names:
        (folder / name).symlink_to((written.folder / name).resolve())
    yield replace(written, folder=folder)
    for name in names:
        (folder / name).unlink()


def read_back(
    written: Written,
    built: Mapping[str, Path],
    layers: Mapping[str, Layer],
    planned: Mapping[str, Format],
    backend: Backend,
    scratch: Path,
) -> dict[str, ReadBack]:
    """What every graph became.

    built: by graph, the files that run. scratch: a folder for temporary files of their size.
    """
    became = {}
    for graph, spec in written.graphs.items():
        mine = {name: layer for name, layer in layers.items() if written.places[name].graph == graph}
        became[graph] = backend.read_back(written.folder / spec.file, built[graph], mine, planned, scratch)
    return became


def as_packed(written: Written, layers: Mapping[str, Layer], planned: Mapping[str, Format]) -> dict[str, ReadBack]:
    """What graphs are before they are compiled: as planned, and not yet run by anything."""
    became = {}
    for graph in written.graphs:
        mine = {name: layer for name, layer in layers.items() if written.places[name].graph == graph}
        became[graph] = ReadBack(
            {
                name: Realised(
                    canonical(planned[name], layer.inputs),
                    "packed, not compiled yet",
                    layer.weights * planned[name].weight_bits // 8,
                )
                for name, layer in mine.items()
            }
        )
    return became


def describe_graphs(written: Written, became: Mapping[str, ReadBack]) -> dict[str, exported.Exported]:
    """What was exported, and which of it stands in what was compiled."""
    return {
        name: exported.describe(written.folder / spec.file, became[name].tensors)
        for name, spec in written.graphs.items()
    }


def unit_records(
    written: Written, became: Mapping[str, ReadBack], layers: Mapping[str, Layer], planned: Mapping[str, Choice]
) -> tuple[UnitRecord, ...]:
    """What every layer became."""
    realised = {name: layer for graph in became.values() for name, layer in graph.layers.items()}
    stored = stored_bytes(written.folder, written.graphs, layers)
    return tuple(
        UnitRecord(
            name=name,
            kind=layer.kind,
            graph=written.places[name].graph,
            outputs=layer.outputs,
            inputs=layer.inputs,
            planned=str(planned[name].format),
            realised=str(realised[name].format),
            arithmetic=realised[name].arithmetic,
            code_bytes=stored[name][0],
            scale_bytes=stored[name][1],
            resident_bytes=realised[name].resident_bytes,
            recipe=planned[name].recipe,
        )
        for name, layer in layers.items()
    )


def stored_bytes(
    folder: Path, graphs: Mapping[str, GraphSpec], layers: Mapping[str, Layer]
) -> dict[str, tuple[int, int]]:
    """Bytes of each layer's codes (or 16-bit weights) and of its scales as written."""
    sizes: dict[str, int] = {}
    for spec in graphs.values():
        model = onnx.load(str(folder / spec.file), load_external_data=False)
        for tensor in model.graph.initializer:
            external = {entry.key: entry.value for entry in tensor.external_data}
            sizes[tensor.name] = int(external["length"]) if external else len(tensor.raw_data)
    return {
        name: (sizes.get(f"{name}.codes", sizes.get(f"{name}.weight", 0)), sizes.get(f"{name}.scales", 0))
        for name in layers
    }


def check_realised(folder: Path, units: tuple[UnitRecord, ...], backend: Backend) -> None:
    """Raises ArtefactError for a layer whose format or bytes are not the planned ones."""
    for unit in units:
        smallest, largest = planned_bytes(unit, backend)
        if unit.realised != str(canonical(Format.parse(unit.planned), unit.inputs)):
            raise ArtefactError(
                f"{folder}: {unit.name} was planned as {unit.planned} but runs as {unit.realised} ({unit.arithmetic})"
            )
        if not smallest <= unit.code_bytes <= largest:
            raise ArtefactError(
                f"{folder}: {unit.name} takes {unit.code_bytes} bytes, planned {unit.planned} takes {smallest}"
            )


def planned_bytes(unit: UnitRecord, backend: Backend) -> tuple[int, int]:
    """Bytes that the planned format needs for a unit's codes: bare, and with what the backend may fill up."""
    fmt = Format.parse(unit.planned)
    rows, columns = backend.filling(fmt)
    filled = -(-unit.outputs // rows) * rows * -(-unit.inputs // columns) * columns
    return -(-unit.weights * fmt.weight_bits // 8), -(-filled * fmt.weight_bits // 8)
