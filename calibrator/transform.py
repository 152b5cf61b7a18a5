"""From a policy and a calibration set to a policy folder that is easier to round, or rounds to something better."""

from dataclasses import dataclass
from pathlib import Path

from calibrator.data.calibration import load_calibration
from calibrator.families import TorchActor, save_policy
from calibrator.transforms import find_transform, parse_transform
from vla_policy.core.files import sha256_policy
from vla_policy.core.outputs import check_folder
from vla_policy.core.policy_config import POLICY

TRANSFORMS = "transforms"
"""Of config.json: what the policy went through, the oldest first, each with its parents."""


@dataclass(frozen=True)
class TransformRequest:
    """method: a transform as text, e.g. `smoothquant(strength=0.7)`. unnorm_key: of the statistics that normalise the
    calibration set's states, if the policy has several."""

    policy: Path
    calibration: Path
    out: Path
    method: str
    unnorm_key: str | None = None


def transform(request: TransformRequest) -> str:
    """Writes the policy folder `request.out`; returns what was done, for people.

    Raises ArtefactError for a method that does not exist and for states that do not suffice, PolicyError for a policy
    that the method is not for.
    """
    check_folder(request.out, POLICY, [request.policy, request.calibration])
    recipe = parse_transform(request.method)
    states = load_calibration(request.calibration)
    actor = TorchActor.load(request.policy, request.unnorm_key)
    method = find_transform(recipe.method)
    done = method.apply(actor, states, {**method.defaults, **dict(recipe.parameters)}, str(request.calibration))
    parents = {"policy": sha256_policy(request.policy), "calibration": states.sha256}
    step = {"recipe": recipe.to_json(), "parents": parents, "done": done}
    save_policy(actor.policy, request.out, request.policy, {TRANSFORMS: [*actor.config.raw.get(TRANSFORMS, []), step]})
    return done
