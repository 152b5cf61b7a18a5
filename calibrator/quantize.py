"""From a policy and what its layers shall be to a store of codes, layer by layer.

Without statistics the policy is never whole in memory. Methods that look at a layer's input get it from the
full-precision policy over a calibration set, for as many layers at a time as `data.statistics.portions` allows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from calibrator.allocation.plan import Assignment
from calibrator.data.calibration import CalibrationSet, load_calibration
from calibrator.data.statistics import input_statistics, portions
from calibrator.families import TorchActor, Unit, live_units
from calibrator.families.loading import Tensors, empty_policy, open_checkpoint
from calibrator.quantizers import Computed, LayerStatistics, needs_statistics, parse_choice
from calibrator.quantizers.store import WEIGHTS, Identity, Store, finish, layer_path, write_layer
from calibrator.sensitivity.journal import difference
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import claim_folder, sha256_policy
from vla_policy.core.formats import Choice
from vla_policy.core.policy_config import PolicyConfig


@dataclass(frozen=True)
class QuantizeRequest:
    """What to quantize: the layers of a plan (a file), or all alike.

    method: a rounding recipe in place of the plan's, e.g. `mse(steps=128)`. calibration, unnorm_key: states, and the
    statistics that they are normalised by, for methods that look at a layer's input.
    """

    policy: Path
    out: Path
    plan: Path | None = None
    uniform: Choice | None = None
    method: str | None = None
    calibration: Path | None = None
    unnorm_key: str | None = None


def quantize(request: QuantizeRequest) -> Store:
    """Writes the store `request.out`, or continues it.

    Raises ArtefactError for a plan of another policy, for a folder that holds weights of other inputs, and where a
    method needs a calibration set and has none.
    """
    config = PolicyConfig.load(request.policy)
    units = live_units(empty_policy(config))
    states = load_calibration(request.calibration) if request.calibration else None
    identity = _identity(request, units, states)
    asking = [unit for unit in units if needs_statistics(identity.choices[unit.name].recipe)]
    if asking and states is None:
        raise ArtefactError(
            f"{asking[0].name} in {identity.choices[asking[0].name]} needs inputs to look at; name states with "
            "--calibration"
        )
    _claim(request, identity)
    missing = [unit for unit in units if _lacks(request.out, unit, identity.choices[unit.name])]
    bar: tqdm[Any] = tqdm(
        total=sum(unit.params for unit in missing), desc="quantizing", unit="weight", unit_scale=True, disable=None
    )
    with open_checkpoint(request.policy, config) as tensors, bar:
        for share, statistics in _shares(request, identity, missing, states):
            for unit in share:
                _quantize_layer(request.out, unit, identity.choices[unit.name], tensors, statistics)
                bar.update(unit.params)
    return finish(request.out, identity)


def _identity(request: QuantizeRequest, units: Sequence[Unit], states: CalibrationSet | None) -> Identity:
    sha256, names = sha256_policy(request.policy), [unit.name for unit in units]
    parents = {"policy": sha256} | ({"calibration": states.sha256} if states else {})
    if request.plan is not None:
        planned = Assignment.load(request.plan, sha256, names)
        choices, parents["plan"] = planned.choices, planned.sha256
    else:
        assert request.uniform is not None
        choices = dict.fromkeys(names, request.uniform)
    if request.method is not None:
        choices = {unit: _by(choice, request.method) for unit, choice in choices.items()}
    return Identity(choices, parents)


def _by(choice: Choice, method: str) -> Choice:
    return choice if choice.recipe is None else parse_choice(f"{choice.format}:{method}")


def _claim(request: QuantizeRequest, identity: Identity) -> None:
    inputs = [request.policy, request.plan, request.calibration]
    found = claim_folder(request.out, WEIGHTS, identity.to_json(), inputs)
    kept = {key: found.get(key) for key in identity.to_json()}
    if changed := difference(kept, identity.to_json()):
        raise ArtefactError(f"{request.out}: holds weights of other inputs ({changed}); choose another --out")


def _lacks(folder: Path, unit: Unit, choice: Choice) -> bool:
    return choice.recipe is not None and not layer_path(folder, unit.name).is_file()


def _shares(
    request: QuantizeRequest, identity: Identity, units: Sequence[Unit], states: CalibrationSet | None
) -> Iterator[tuple[Sequence[Unit], Mapping[str, LayerStatistics]]]:
    """The layers in portions, with the statistics of those that need them."""
    asking = [unit for unit in units if needs_statistics(identity.choices[unit.name].recipe)]
    yield [unit for unit in units if unit not in asking], {}
    if not asking:
        return
    assert states is not None
    actor = TorchActor.load(request.policy, request.unnorm_key)
    groups: dict[str, list[Unit]] = {}
    for unit in asking:
        groups.setdefault(unit.group, []).append(unit)
    for share in portions(list(groups.values()), lambda group: group[0].module):
        # Layers of one group have one input.
        found = input_statistics(actor, states, [group[0].name for group in share], str(request.calibration), True)
        yield (
            [unit for group in share for unit in group],
            {unit.name: found[group[0].name] for group in share for unit in group},
        )


def _quantize_layer(
    folder: Path, unit: Unit, choice: Choice, tensors: Tensors, statistics: Mapping[str, LayerStatistics]
) -> None:
    weight = tensors.tensor(f"{unit.name}.weight")
    write_layer(folder, unit.name, Computed(statistics).of(unit.name, weight, choice))
