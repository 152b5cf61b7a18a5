"""From a policy and what its layers shall be to a store of codes, layer by layer; see `calibrator.codes`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calibrator.allocation.plan import Assignment
from calibrator.codes import Source, Wanted, check_source, write_codes
from calibrator.data.calibration import CalibrationSet, load_calibration
from calibrator.families import Unit, empty_policy, live_units
from calibrator.quantizers import parse_choice
from calibrator.quantizers.store import WEIGHTS, Identity, Store, finish
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
    units = live_units(empty_policy(PolicyConfig.load(request.policy)))
    states = load_calibration(request.calibration) if request.calibration else None
    identity = _identity(request, units, states)
    wanted = [one for unit in units for one in _wanted(unit, identity, request.out)]
    source = Source(request.policy, request.calibration, request.unnorm_key)
    check_source(source, wanted)
    _claim(request, identity)
    write_codes(source, wanted)
    return finish(request.out, identity)


def _identity(request: QuantizeRequest, units: Sequence[Unit], states: CalibrationSet | None) -> Identity:
    sha256, names = sha256_policy(request.policy), [unit.name for unit in units]
    parents = {"policy": sha256} | ({"calibration": states.sha256} if states else {})
    if request.plan is not None:
        planned = Assignment.load(request.plan, sha256, names)
        parents["plan"] = planned.sha256
        identity = Identity(
            planned.choices, parents, planned.target, planned.backend, planned.input_peaks, planned.rows
        )
    else:
        assert request.uniform is not None
        identity = Identity(dict.fromkeys(names, request.uniform), parents)
    if request.method is None:
        return identity
    return replace(identity, choices={unit: _by(one, request.method) for unit, one in identity.choices.items()})


def _wanted(unit: Unit, identity: Identity, folder: Path) -> list[Wanted]:
    """Of a layer, or of its parts, what has codes."""
    pieces = identity.rows.of(unit.name) if unit.name in identity.rows.bits else [None]
    wanted = [Wanted(unit, identity.choices[piece.name if piece else unit.name], folder, piece) for piece in pieces]
    return [one for one in wanted if one.choice.recipe]


def _by(choice: Choice, method: str) -> Choice:
    return choice if choice.recipe is None else parse_choice(f"{choice.format}:{method}")


def _claim(request: QuantizeRequest, identity: Identity) -> None:
    inputs = [request.policy, request.plan, request.calibration]
    found = claim_folder(request.out, WEIGHTS, identity.to_json(), inputs)
    kept = {key: found.get(key) for key in identity.to_json()}
    if changed := difference(kept, identity.to_json()):
        raise ArtefactError(f"{request.out}: holds weights of other inputs ({changed}); choose another --out")
