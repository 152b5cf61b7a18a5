"""Codes of a policy's layers by their recipes, written once: from the checkpoint, and where a method looks at a layer's
input, from the full-precision policy over a calibration set, for as many layers at a time as `data.statistics.portions`
allows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from calibrator.data.calibration import load_calibration
from calibrator.data.statistics import input_statistics, portions
from calibrator.families import TorchActor, Unit
from calibrator.families.loading import open_checkpoint
from calibrator.quantizers import Computed, LayerStatistics, QuantizedWeight, needs_guidance, needs_statistics
from calibrator.quantizers.rows import Part
from calibrator.quantizers.store import layer_path, read_layer, write_layer
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Choice
from vla_policy.core.policy_config import PolicyConfig


@dataclass(frozen=True)
class Source:
    """What codes are made from. calibration, unnorm_key: states, and the statistics that they are normalised by, for
    methods that look at a layer's input."""

    policy: Path
    calibration: Path | None = None
    unnorm_key: str | None = None


@dataclass(frozen=True)
class Wanted:
    """Codes of one layer, or of one part of it, in a choice below 16 bits, and the store's folder that they go to."""

    unit: Unit
    choice: Choice
    folder: Path
    part: Part | None = None

    @property
    def name(self) -> str:
        return self.part.name if self.part else self.unit.name

    @property
    def missing(self) -> bool:
        return not layer_path(self.folder, self.name).is_file()

    @property
    def params(self) -> int:
        """Number of weights."""
        return len(self.part.rows) * self.unit.module.weight[0].numel() if self.part else self.unit.params


def check_source(source: Source, wanted: Sequence[Wanted]) -> None:
    """Raises ArtefactError where a method looks at a layer's input and no calibration set is named."""
    asking = [one for one in wanted if needs_statistics(one.choice.recipe)]
    if asking and source.calibration is None:
        raise ArtefactError(
            f"{asking[0].name} in {asking[0].choice} needs inputs to look at; name states with --calibration"
        )


def write_codes(source: Source, wanted: Sequence[Wanted]) -> None:
    """Writes what is missing of `wanted`, layer by layer, each whole or not at all."""
    missing = [one for one in wanted if one.missing]
    if not missing:
        return
    bar: tqdm[Any] = tqdm(
        total=sum(one.params for one in missing), desc="quantizing", unit="weight", unit_scale=True, disable=None
    )
    with open_checkpoint(source.policy, PolicyConfig.load(source.policy)) as tensors, bar:
        for share, statistics in _shares(source, missing):
            for one in share:
                weight = tensors.tensor(f"{one.unit.name}.weight")
                weight = weight[one.part.rows] if one.part else weight
                write_layer(one.folder, one.name, Computed(statistics).of(one.name, weight, one.choice))
                bar.update(one.params)


def _shares(
    source: Source, wanted: Sequence[Wanted]
) -> Iterator[tuple[Sequence[Wanted], Mapping[str, LayerStatistics]]]:
    """The layers in portions, with the statistics of those that need them."""
    asking = [one for one in wanted if needs_statistics(one.choice.recipe)]
    yield [one for one in wanted if one not in asking], {}
    if not asking:
        return
    assert source.calibration is not None
    states, actor = load_calibration(source.calibration), TorchActor.load(source.policy, source.unnorm_key)
    for guided in (False, True):
        groups: dict[str, list[Wanted]] = {}
        for one in asking:
            if needs_guidance(one.choice.recipe) is guided:
                # Layers of one group have one input, and each its own weights of its rows.
                groups.setdefault(one.unit.name if guided else one.unit.group, []).append(one)
        for share in portions(list(groups.values()), lambda group: group[0].unit.module):
            names = [group[0].unit.name for group in share]
            found = input_statistics(actor, states, names, str(source.calibration), True, guided)
            yield (
                [one for group in share for one in group],
                {one.name: found[group[0].unit.name] for group in share for one in group},
            )


def are_kept(choice: Choice) -> bool:
    """Whether codes in this choice are worth keeping: round-to-nearest is found faster than it is read back."""
    return choice.recipe is not None and choice.recipe.method != "rtn"


@dataclass(frozen=True)
class KeptCodes:
    """Codes of many choices in a folder that holds one store for each; see `are_kept`."""

    folder: Path

    def place(self, choice: Choice) -> Path:
        """Where the codes in `choice` are."""
        return self.folder / str(choice)

    def of(self, unit: str, weight: Tensor, choice: Choice) -> QuantizedWeight:
        """Raises ArtefactError for codes that should be there and are not, or are damaged."""
        if not are_kept(choice):
            return Computed().of(unit, weight, choice)
        return read_layer(layer_path(self.place(choice), unit), weight, choice).to(weight.device)
