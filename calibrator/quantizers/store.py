"""Quantized weights on disk: what a layer's codes are is decided once, and packed from here.

`weights.json` says what every layer is and from what the codes were made; beside it lies a safetensors file for every
layer below 16 bits, or every part of one that is split (`calibrator.quantizers.rows`), with `codes` (packed bits,
row-major), `scales` (float16 [out, groups]) and, of an input operator, `turns.N.order` (int32 [in]) and
`turns.N.blocks` (float16 [n, size, size]). A store is filled layer by layer; until `files` stand in its index, it is
unfinished.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from calibrator.quantizers.packing import pack, unpack
from calibrator.quantizers.rows import ROWS, WHOLE, RowBits
from calibrator.quantizers.turning import InputOperator
from calibrator.quantizers.weights import QuantizedWeight, groups_per_row
from calibrator.tensors import save_tensors
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import read_json, sha256_file, write_json
from vla_policy.core.formats import Choice
from vla_policy.core.outputs import FolderKind, atomic_path

WEIGHTS = FolderKind("weights", "weights.json", ("layers/*.safetensors", ROWS))
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Identity:
    """What the codes depend on. choices: by layer, or by part of the layers that `rows` splits. parents: sha256 of the
    policy and, where there are any, plan and calibration set. target, backend, input_peaks: of the plan, see
    `allocation.plan.Plan`."""

    choices: Mapping[str, Choice]
    parents: Mapping[str, str]
    target: str | None = None
    backend: str | None = None
    input_peaks: Mapping[str, float] = field(default_factory=dict)
    rows: RowBits = WHOLE

    def to_json(self) -> dict[str, Any]:
        choices = {unit: choice.to_json() for unit, choice in self.choices.items()}
        inputs = {"target": self.target, "backend": self.backend, "input_peaks": dict(self.input_peaks)}
        return {"schema_version": SCHEMA_VERSION, "parents": dict(self.parents), "layers": choices, **inputs}


@dataclass(frozen=True)
class Store:
    """A finished store. sha256: of its index, which holds those of all files."""

    folder: Path
    identity: Identity
    files: Mapping[str, str]
    sha256: str

    @staticmethod
    def open(folder: Path) -> "Store":
        """Raises ArtefactError when the store is missing, damaged, of another version, or unfinished."""
        path = folder / WEIGHTS.index
        raw = read_json(path, WEIGHTS.name, SCHEMA_VERSION)
        if "files" not in raw:
            raise ArtefactError(f"{folder}: is unfinished; call `calibrator quantize` again, which continues it")
        try:
            choices = {unit: Choice.from_json(entry) for unit, entry in raw["layers"].items()}
            inputs = raw.get("target"), raw.get("backend"), raw.get("input_peaks", {})
            rows = RowBits.load(folder / ROWS, raw["rows"]) if "rows" in raw else WHOLE
            identity = Identity(choices, dict(raw["parents"]), *inputs, rows)
            return Store(folder, identity, dict(raw["files"]), sha256_file(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(f"{path}: entry {error} is missing or malformed; quantize again") from error

    def choices_of(self, policy_sha256: str, layers: Collection[str]) -> dict[str, Choice]:
        """What the named layers, or their parts, are, in their order; ArtefactError unless the store holds exactly this
        policy's."""
        made_for, choices = self.identity.parents.get("policy"), self.identity.choices
        units = self.identity.rows.units(layers)
        if made_for != policy_sha256 or set(choices) != set(units):
            raise ArtefactError(
                f"{self.folder}: made for the policy with sha256 {str(made_for)[:12]}, this one has "
                f"{policy_sha256[:12]}; quantize this policy"
            )
        self.identity.rows.check(choices, self.folder)
        return {name: choices[name] for name in units}

    def of(self, unit: str, weight: Tensor, choice: Choice) -> QuantizedWeight:
        """The codes of a layer, whose `weight` is only looked at for its shape.

        Raises ArtefactError when the store holds the layer in another choice, or its file is missing or damaged.
        """
        held = self.identity.choices.get(unit)
        if held != choice:
            raise ArtefactError(f"{self.folder}: holds {unit} in {held}, wanted is {choice}; quantize for this plan")
        path = layer_path(self.folder, unit)
        if sha256_file(path) != self.files[unit]:
            raise ArtefactError(f"{path}: not the file that {WEIGHTS.index} names; quantize into another folder")
        return read_layer(path, weight, choice)


def layer_path(folder: Path, unit: str) -> Path:
    """The file of one layer."""
    return folder / "layers" / f"{unit}.safetensors"


def write_layer(folder: Path, unit: str, weight: QuantizedWeight) -> None:
    """Writes one layer, whole or not at all."""
    packed = np.frombuffer(pack(weight.codes.cpu().numpy(), weight.format.weight_bits), np.uint8)
    tensors: dict[str, np.ndarray] = {"codes": packed, "scales": weight.scales.cpu().numpy().astype(np.float16)}
    for number, turn in enumerate(weight.operator.turns if weight.operator else ()):
        tensors[f"turns.{number}.order"] = turn.order.cpu().numpy().astype(np.int32)
        tensors[f"turns.{number}.blocks"] = turn.blocks.cpu().numpy().astype(np.float16)
    with atomic_path(layer_path(folder, unit), None) as temporary:
        save_tensors(temporary, tensors, WEIGHTS.name)


def read_layer(path: Path, weight: Tensor, choice: Choice) -> QuantizedWeight:
    """One layer's codes; `weight` is only looked at for its shape.

    Raises ArtefactError when the file is missing, damaged or of another shape.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path}: missing, damaged or truncated ({error}); quantize again") from error
    outputs, inputs = len(weight), weight[0].numel()
    codes = unpack(tensors["codes"].tobytes(), choice.format.weight_bits, outputs * inputs)
    scales = tensors["scales"].astype(np.float32)
    if codes.size != outputs * inputs or scales.shape != (outputs, groups_per_row(inputs, choice.format)):
        raise ArtefactError(f"{path}: of another shape than {path.stem}, {list(weight.shape)}; quantize this policy")
    rows = torch.from_numpy(codes.reshape(outputs, inputs))
    shape = tuple(weight.shape)
    return QuantizedWeight(rows, torch.from_numpy(scales), choice.format, shape, _operator(path, tensors, inputs))


def _operator(path: Path, tensors: Mapping[str, np.ndarray], inputs: int) -> InputOperator | None:
    """Raises ArtefactError for one that does not belong to so many inputs."""
    numbers = range(sum(name.endswith(".order") for name in tensors))
    try:
        steps = [(tensors[f"turns.{number}.order"], tensors[f"turns.{number}.blocks"]) for number in numbers]
    except KeyError as error:
        raise ArtefactError(f"{path}: tensor {error} is missing; quantize again") from error
    for order, blocks in steps:
        square = blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2]
        if not square or len(blocks) not in (1, inputs // blocks.shape[1]) or sorted(order) != list(range(inputs)):
            raise ArtefactError(f"{path}: its input operator is not of {inputs} inputs; quantize this policy")
    found = InputOperator.of([(torch.from_numpy(order), torch.from_numpy(blocks)) for order, blocks in steps])
    return found if steps else None


def finish(folder: Path, identity: Identity) -> Store:
    """Ends a store of which every layer is written."""
    coded = [unit for unit, choice in identity.choices.items() if choice.recipe is not None]
    files = {unit: sha256_file(layer_path(folder, unit)) for unit in coded}
    split = {"rows": identity.rows.save(folder / ROWS)} if identity.rows else {}
    write_json(folder / WEIGHTS.index, {"kind": WEIGHTS.name, **identity.to_json(), "files": files, **split})
    return Store.open(folder)
