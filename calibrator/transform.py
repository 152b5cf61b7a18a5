"""From a policy and a calibration set to an equivalent policy folder whose layers are easier to round."""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from calibrator.data.calibration import load_calibration
from calibrator.data.statistics import input_statistics, portions
from calibrator.families import TorchActor, save_policy
from calibrator.transforms import find_transform, fold, folds_of, parse_transform
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


def transform(request: TransformRequest) -> int:
    """Writes the policy folder `request.out`; returns how many norms and layers took factors.

    Raises ArtefactError for a method that does not exist and for states that show nothing of a layer's input.
    """
    check_folder(request.out, POLICY, [request.policy, request.calibration])
    recipe = parse_transform(request.method)
    states = load_calibration(request.calibration)
    actor = TorchActor.load(request.policy, request.unnorm_key)
    method, parameters = find_transform(recipe.method), dict(recipe.parameters)
    folds = folds_of(actor.policy, method.after_layers)
    for share in portions(folds, lambda one: one.layers[one.first]):
        names = [one.first for one in share]
        # What is folded leaves the inputs of all other folds as they are.
        found = input_statistics(actor, states, names, str(request.calibration), method.needs_second_moments)
        for one in tqdm(share, desc=recipe.method, unit="fold", disable=None):
            fold(one, method, {**method.defaults, **parameters}, found[one.first])
    parents = {"policy": sha256_policy(request.policy), "calibration": states.sha256}
    history = [*actor.config.raw.get(TRANSFORMS, []), {"recipe": recipe.to_json(), "parents": parents}]
    save_policy(actor.policy, request.out, request.policy, {TRANSFORMS: history})
    return len(folds)
