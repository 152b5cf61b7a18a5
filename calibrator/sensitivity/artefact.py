"""The artefact of a finished run: scores of all records, their tensors, and what they were made from."""

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrator.conventions.check import Outcome
from calibrator.families import Policy, live_units
from calibrator.families.loading import matrix_names
from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.executors import Executor
from calibrator.sensitivity.ledger import Measured, loss_of
from calibrator.sensitivity.maps import MapsTask, pick_samples, pick_units
from calibrator.sensitivity.run import Run
from calibrator.sensitivity.states import Reference
from calibrator.sensitivity.sweep import DTYPES
from calibrator.sensitivity.table import (
    KIND,
    SCHEMA_VERSION,
    Estimate,
    Sensitivity,
    below_floor,
    inversions,
    score_unit,
    shown_first,
    stack_losses,
    write_tensors,
)
from vla_policy.core.files import write_json
from vla_policy.core.formats import FULL
from vla_policy.core.targets import no_kernel

_MAP_SAMPLES = 3


def tensor_files(out: Path) -> dict[str, Path]:
    """Where the arrays of the artefact at `out` go, by their kind."""
    prefix = "" if out.stem == "sensitivity" else f"{out.stem}."
    return {kind: out.with_name(f"{prefix}{kind}.safetensors") for kind in ("losses", "maps")}


def write(
    run: Run, out: Path, executor: Executor, ref: Reference, conventions: Outcome, measured: Measured
) -> Sensitivity:
    """Scores the records and writes the tensors, then the JSON that names their hashes."""
    progress, choices = run.states.calibration.progress, run.spec.settings.choices
    actions = None if measured.proxies is None else [proxy.action for proxy in measured.proxies]
    nothing: list[None] = [None] * len(run.chosen)
    estimates: Sequence[Estimate | None] = measured.estimates or nothing
    proxies: Sequence[np.ndarray | None] = actions or nothing
    units = [
        score_unit(shape, record, action, run.phases, run.scores, estimate)
        for shape, record, action, estimate in zip(run.chosen, measured.records, proxies, estimates, strict=True)
    ]
    floor = max(float(loss_of(losses, run.scores).mean()) for losses in measured.floor)
    shown = pick_samples(progress, min(_MAP_SAMPLES, len(run.states)))
    ((maps, map_axes),) = executor.run(
        [MapsTask(tuple(pick_units(units, shown_first(choices))), tuple(shown), run.scores)], ref
    )
    tensors = {"losses": stack_losses(measured.records, actions, progress, run.scores), "maps": maps}
    files = {}
    for key, path in tensor_files(out).items():
        files[key] = {"name": path.name, "sha256": write_tensors(path, tensors[key], key)}
    names = {unit.name for unit in units}
    content = (
        _header(run)
        | measured.facts
        | {
            "units": [unit.to_json() for unit in units],
            "conventions": conventions.to_json(),
            "unmeasured": [shape.name for shape in run.shapes if shape.name not in names],
            "unquantized_params": _engine_params(run.policy) - sum(unit.params for unit in units),
            "input_peaks": {unit.name: ref.peaks[unit.name] for unit in units},
            "kept": [unit.name for unit in live_units(run.policy) if unit.kept and unit.name in names],
            "stray_states": int(np.count_nonzero(ref.strays)),
            "random_spread": None if np.isnan(ref.spread).any() else {"action_mse": float(ref.spread.mean())},
            "noise_floor": {"omega": floor, "samples": list(run.floor_samples)},
            "below_floor": below_floor(units, choices, floor),
            "inversions": inversions(units, choices),
            "files": files,
            "maps": map_axes,
            "cost": _cost(run, executor),
        }
    )
    write_json(out, content)
    return Sensitivity.load(out)


def all_params(policy: Policy) -> int:
    return sum(parameter.numel() for parameter in policy.parameters())


def _engine_params(policy: Policy) -> int:
    """Without what no decision reads."""
    return all_params(policy) - sum(unit.module.weight.numel() - unit.params for unit in live_units(policy))


def _header(run: Run) -> dict[str, Any]:
    """Parents, settings and versions."""
    calibration, settings = run.states.calibration, run.spec.settings
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "identity": run.identity,
        "policy": {"id": Path(run.spec.policy).resolve().name, "sha256": run.identity["policy_sha256"]},
        "calibration": {
            "sha256": calibration.sha256,
            "samples": len(calibration),
            "trajectories": calibration.trajectories,
            "phases": np.bincount(run.phases, minlength=run.scores.bins).tolist(),
        },
        "choices": [choice.to_json() for choice in (*settings.choices, FULL)],
        "target": settings.target,
        "no_kernel": no_kernel(settings.choices, settings.target),
        "kappa": run.scores.kappa,
        "lambda": run.scores.attribution_weight,
        "bins": run.scores.bins,
        "epsilon": settings.epsilon,
        "boundaries": list(BOUNDARIES),
        "language_block": run.policy.chain(settings.language_block).language_block,
        "dtype": settings.dtype,
        "versions": {"python": platform.python_version(), **run.identity["versions"]},
    }


def _cost(run: Run, executor: Executor) -> dict[str, Any]:
    """What the run took; peaks are of the hungriest process. policy_bytes: of the weights, in memory."""
    usage, narrow = executor.usage, matrix_names(run.policy)
    assert usage is not None, "maps are always computed"
    width = DTYPES[run.spec.settings.dtype].itemsize
    return {
        "device": usage.device,
        "seconds": time.monotonic() - run.started_s,
        "peak_rss_bytes": usage.rss_bytes,
        "peak_device_bytes": usage.device_bytes,
        "policy_bytes": sum(
            parameter.numel() * (width if name in narrow else torch.float32.itemsize)
            for name, parameter in run.policy.named_parameters()
        ),
    }
