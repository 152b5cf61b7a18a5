"""`manifest.json`: what an engine folder holds, from what it was made, and which formats its layers really have."""

import hashlib
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_policy.core.backends import find_backend
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import confined_file, named_file, read_json, sha256_file, write_json
from vla_policy.core.formats import Choice, Format, Recipe
from vla_policy.core.outputs import FolderKind
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.program import Call, GraphSpec, Range, TensorSpec, check_program

if TYPE_CHECKING:  # which imports this module
    from vla_policy.core.backends.base import LayerKind

MANIFEST = "manifest.json"
KIND = "engine"
ENGINE = FolderKind(KIND, MANIFEST, listed="files")
SCHEMA_VERSION = 4


@dataclass(frozen=True)
class UnitRecord:
    """One quantizable layer as planned and as read back from the built engine. graph: the one that holds it.

    planned, recipe: its format, and how its codes were found. realised, arithmetic: weight format, and what multiplies
    it, as the backend reports after its optimisations. code_bytes, scale_bytes: in the engine's files. resident_bytes:
    of both once loaded; None where not reported.
    """

    name: str
    kind: "LayerKind"
    graph: str
    outputs: int
    inputs: int
    planned: str
    realised: str
    arithmetic: str
    code_bytes: int
    scale_bytes: int
    resident_bytes: int | None
    recipe: Recipe | None

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs

    @property
    def choice(self) -> Choice:
        """What was planned."""
        return Choice(Format.parse(self.planned), self.recipe)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"recipe": self.recipe and self.recipe.to_json()}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> "UnitRecord":
        return UnitRecord(**{**raw, "recipe": Recipe.from_json(raw["recipe"])})


@dataclass(frozen=True)
class FileRecord:
    """Content of one file of the engine folder."""

    sha256: str
    bytes: int

    def check_size(self, path: Path, size: int) -> None:
        """Raises ArtefactError for a file at `path` of another size."""
        if size != self.bytes:
            raise ArtefactError(f"{path}: {size} bytes, expected {self.bytes}; truncated: copy or build it again")

    def check_sha256(self, path: Path, sha256: str) -> None:
        """Raises ArtefactError for a file at `path` of another content."""
        if sha256 != self.sha256:
            raise ArtefactError(f"{path}: sha256 differs from the manifest's; altered: copy or build it again")


@dataclass(frozen=True)
class Manifest:
    """See the module.

    graphs, program: by name, the graphs and the calls that a decision makes of them.
    backend_version: of what compiled or, where nothing is, optimised the graphs. written_for: the one in whose forms
    the graphs were written, which a device may have a later one of.
    policy_config: the policy's `config.json`: architecture, tokens, statistics. other_bytes: all that is no unit's.
    legalized: formats that were raised for the target, in words. input_peaks: largest |input| of the layers whose
    activations have a fixed scale. notes: what a reader should know of the build.
    """

    target: str
    backend: str
    backend_version: str
    builder_version: str
    graphs: dict[str, GraphSpec]
    program: dict[str, Call]
    units: tuple[UnitRecord, ...]
    files: dict[str, FileRecord]
    parents: dict[str, str]
    policy_config: dict[str, Any]
    other_bytes: int
    written_for: str = ""
    legalized: tuple[str, ...] = ()
    input_peaks: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """Whether the graphs are still to be compiled, by `engine_build prove` on the device."""
        return not self.backend_version

    @property
    def config(self) -> PolicyConfig:
        """The policy's configuration as types."""
        return PolicyConfig.from_dict(self.policy_config, MANIFEST)

    def to_json(self) -> dict[str, Any]:
        """The artefact, with what a reader needs spelled out: preprocessing, action layout, sums."""
        config = self.config
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            **asdict(self),
            "units": [unit.to_json() for unit in self.units],
            **config.family.description(config),
            "totals": self.totals(),
        }

    def totals(self) -> dict[str, Any]:
        """Sums over the units, and what `average_bits` counts: codes only, as Mix-QVLA's C_size does."""
        weights = sum(unit.weights for unit in self.units)
        codes = sum(unit.code_bytes for unit in self.units)
        return {
            "units": len(self.units),
            "weights": weights,
            "code_bytes": codes,
            "scale_bytes": sum(unit.scale_bytes for unit in self.units),
            "other_bytes": self.other_bytes,
            "engine_bytes": sum(record.bytes for record in self.files.values()),
            "average_bits": round(8 * codes / weights, 4) if weights else 0.0,
        }

    def write(self, folder: Path | str) -> None:
        write_json(Path(folder) / MANIFEST, self.to_json())

    @staticmethod
    def load(folder: Path | str) -> "Manifest":
        """Reads `folder/manifest.json`.

        Raises ArtefactError if it is missing, damaged or of another version, or names a file outside the folder.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise ArtefactError(f"{path}: no such file; expected an engine folder made by `engine_build build`")
        content = read_json(path, KIND, SCHEMA_VERSION)
        try:
            manifest = _parse(content)
            for name in (*manifest.files, *(graph.file for graph in manifest.graphs.values())):
                named_file(path.parent, name)
            return manifest
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(f"{path}: field {error} is missing or malformed; build the engine again") from error

    def check_files(self, folder: Path | str) -> None:
        """Raises ArtefactError for the first file that is missing, truncated, altered or a link out of the folder.

        Also for one that would be loaded without being among the files: the policy's, a graph, what a graph names.
        """
        graphs = [graph.file for graph in self.graphs.values()]
        self._check_recorded(folder, "manifest.json", (*self.config.family.files, *graphs))
        for name, record in self.files.items():
            path = confined_file(folder, name)
            if not path.is_file():
                raise ArtefactError(f"{path}: missing from the engine; copy or build it again")
            record.check_size(path, path.stat().st_size)
            record.check_sha256(path, sha256_file(path))
        backend = find_backend(self.backend)
        for name in graphs:
            self._check_recorded(folder, name, sorted(backend.files_named_in(Path(folder) / name)))

    @contextmanager
    def mapped_file(self, folder: Path | str, name: str) -> Iterator[mmap.mmap]:
        """The content of one of the files, mapped and not copied: what reads it takes no memory that could not be given
        back. Raises ArtefactError unless the very bytes that are mapped are right."""
        self._check_recorded(folder, "manifest.json", (name,))
        path = confined_file(folder, name)
        try:
            with open(path, "rb") as stream:
                self.files[name].check_size(path, path.stat().st_size)
                content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ArtefactError(f"{path}: cannot be read ({reason}); copy or build the engine again") from error
        with content:
            self.files[name].check_sha256(path, hashlib.sha256(content).hexdigest())
            yield content

    def _check_recorded(self, folder: Path | str, by: str, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.files:
                raise ArtefactError(
                    f"{folder}: {by} needs {name!r}, of which the manifest has no hash; build the engine again"
                )


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Records of every file in `folder` but the manifest, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    return {path.name: FileRecord(sha256_file(path), path.stat().st_size) for path in files}


def _parse(content: Mapping[str, Any]) -> Manifest:
    graphs = {name: _graph(value) for name, value in content["graphs"].items()}
    calls = {name: _call(value) for name, value in content["program"].items()}
    check_program(graphs, calls)
    return Manifest(
        target=content["target"],
        backend=content["backend"],
        backend_version=content["backend_version"],
        builder_version=content["builder_version"],
        graphs=graphs,
        program=calls,
        units=tuple(UnitRecord.from_json(unit) for unit in content["units"]),
        files={name: FileRecord(**record) for name, record in content["files"].items()},
        parents=dict(content["parents"]),
        policy_config=dict(content["policy_config"]),
        other_bytes=int(content["other_bytes"]),
        written_for=content["written_for"],
        legalized=tuple(content["legalized"]),
        input_peaks=dict(content["input_peaks"]),
        notes=tuple(content["notes"]),
        versions=dict(content["versions"]),
    )


def _graph(raw: Mapping[str, Any]) -> GraphSpec:
    return GraphSpec(raw["file"], _tensors(raw["inputs"]), _tensors(raw["outputs"]))


def _call(raw: Mapping[str, Any]) -> Call:
    sizes = {name: Range(**(size | {"steps": tuple(size["steps"])})) for name, size in raw["sizes"].items()}
    return Call(raw["graph"], sizes, dict(raw["carried"]), dict(raw["appended"]))


def _tensors(raw: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(**(tensor | {"shape": tuple(tensor["shape"])})) for tensor in raw)
