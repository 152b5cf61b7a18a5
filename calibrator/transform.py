"""From a policy and a calibration set to an equivalent policy folder whose layers are easier to round."""

from dataclasses import dataclass
from pathlib import Path

from calibrator.data.calibration import load_calibration
from calibrator.data.statistics import input_statistics
from calibrator.families import TorchActor, save_policy
from calibrator.transforms import fold_policy, parse_transform
from calibrator.transforms.fold import folds_of
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
    """Writes the policy folder `request.out`; returns how many norms took factors.

    Raises ArtefactError for a method that does not exist and for states that show nothing of a layer's input.
    """
    check_folder(request.out, POLICY, [request.policy, request.calibration])
    recipe = parse_transform(request.method)
    states = load_calibration(request.calibration)
    actor = TorchActor.load(request.policy, request.unnorm_key)
    names = [fold.first for fold in folds_of(actor.policy)]
    statistics = input_statistics(actor, states, names, str(request.calibration))
    folded = fold_policy(actor.policy, recipe, statistics)
    parents = {"policy": sha256_policy(request.policy), "calibration": states.sha256}
    history = [*actor.config.raw.get(TRANSFORMS, []), {"recipe": recipe.to_json(), "parents": parents}]
    save_policy(actor.policy, request.out, request.policy / "tokenizer.json", {TRANSFORMS: history})
    return folded
