"""What an engine tells of the conventions of the states that its plan rests on."""

from pathlib import Path

from calibrator.allocation.plan import KIND, SCHEMA_VERSION
from calibrator.conventions.check import check
from calibrator.conventions.deciders import PolicyDecider
from calibrator.data.calibration import load_calibration
from calibrator.families import load_policy
from vla_policy.core.files import read_json


def conventions_note(
    policy: Path, plan: Path | None, calibration: Path | None, unnorm_key: str | None, accept: bool
) -> str:
    """One line for the manifest: what was checked when the plan's layers were measured, or now, on a set that is given.

    Raises DataError where another convention fits clearly better and that is not accepted.
    """
    raw = read_json(plan, KIND, SCHEMA_VERSION) if plan else {}
    states = load_calibration(calibration) if calibration else None
    if states is not None and states.sha256 != raw.get("parents", {}).get("calibration_sha256"):
        outcome = check(PolicyDecider(load_policy(policy), policy), states, unnorm_key)
        return outcome.require(accept, "--accept-conventions").summary
    untold = "the plan does not tell" if plan else "built without a plan and without states"
    return str(raw.get("conventions", f"conventions not checked: {untold}"))
