"""What the sensitivity sweep costs and what its tables are worth: naive, exact, bfloat16 and screened on one policy.

    python benchmarks/sensitivity.py --policy demo/policies/metaworld --calibration calibration/ --out result.json

With `--held` weights held in bfloat16 are measured beside float32 on all layers and states: how far scores differ, how
far above the float32 table's plans those of the bfloat16 table are, and the noise floors.

Naive is one full forward and one full backward pass per layer, choice and state, states one by one. Naive and exact are
timed on the same layers and states (wall and CPU time, in turns) and their losses compared. Screened is replayed on the
table of a finished exact run (`--table sensitivity.json`): its evaluations are looked up there, so many seeds and
calibration sets (random halves of the states) can be tried, and its plans are priced beside the exhaustive plans.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from calibrator.allocation.planning import Limits, Planner, PlanRequest
from calibrator.data.calibration import load_calibration
from calibrator.families import live_units
from calibrator.quantizers import parse_choices, quantized
from calibrator.sensitivity.evidence import BOUNDARIES, evidence_map, jensen_shannon, mass_distortion, profile
from calibrator.sensitivity.journal import difference
from calibrator.sensitivity.measure import measure
from calibrator.sensitivity.passes import Signals
from calibrator.sensitivity.proxy import first_order
from calibrator.sensitivity.run import RunOptions
from calibrator.sensitivity.scores import ScoreSettings, phase_of, soft_bottleneck, temporal_score
from calibrator.sensitivity.screening import Request, Screen, ScreenProblem, ScreenResult, ScreenSettings
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec
from calibrator.sensitivity.table import Objective, Sensitivity, UnitScores, load_tensors
from vla_policy.core.cli import run
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_policy, write_json
from vla_policy.core.formats import FULL, Choice
from vla_policy.core.outputs import check_file

_KIND = "sensitivity-benchmark"
TARGETS = (3.0, 4.0, 6.0)


def naive_signals(sweep: Sweep, state: int) -> Signals:
    """One state's boundaries by one full forward pass and one full backward pass of the policy as it is."""
    batch = sweep.states.batch(sweep.policy, (state,), sweep.reference.decided)
    pixels = batch.inputs["pixel_values"].requires_grad_()
    with torch.enable_grad():
        values = sweep.chain.run(batch.values)
        output = values[sweep.chain.output]
        objective = batch.objective(output)
        points = {boundary: values[name] for boundary, name in sweep.chain.boundaries.items()}
        _, *gradients = torch.autograd.grad(objective.sum(), [pixels, *points.values()])
    hidden = {boundary: value.detach() for boundary, value in points.items()}
    return Signals(hidden, dict(zip(points, gradients, strict=True)), objective.detach(), output.detach())


def naive_unit(sweep: Sweep, unit: str, choices: Sequence[Choice], states: int) -> np.ndarray:
    """Evidence losses [choices, states, boundaries] of one layer without anything shared or batched."""
    means = {name: torch.from_numpy(mean) for name, mean in sweep.reference.means.items()}
    losses = np.zeros((len(choices), states, len(BOUNDARIES)))

    def profiles(state: int) -> dict[str, Any]:
        found = naive_signals(sweep, state)
        return {k: profile(evidence_map(found.hidden[k], means[k], found.gradients[k])) for k in BOUNDARIES}

    for state in range(states):
        before = profiles(state)
        for row, choice in enumerate(choices):
            with quantized(sweep.policy, unit, choice):
                now = profiles(state)
            for column, name in enumerate(BOUNDARIES):
                attribution = jensen_shannon(before[name].attribution, now[name].attribution)
                losses[row, state, column] = float(mass_distortion(before[name], now[name]) + attribution)
    return losses


@dataclass
class Clock:
    """Wall and CPU seconds, added up."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __enter__(self) -> "Clock":
        self._started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s += time.perf_counter() - self._started[0]
        self.cpu_s += time.process_time() - self._started[1]


def compare_exact(spec: SweepSpec, stride: int, states: int) -> dict[str, Any]:
    """Times naive and exact, layer by layer in turns, and the largest difference of their losses."""
    sweep = spec.open()
    names = [unit.name for unit in live_units(sweep.policy)][::stride]
    states = min(states, len(sweep.states))
    naive, exact = Clock(), Clock()
    differences: list[float] = []
    sweep.evaluate(names[0], spec.settings.choices[:1], (0,))  # loads kernels before the clocks start
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for name in tqdm(names, desc="naive against exact", unit="layer"):
        with exact:
            found = sweep.evaluate(name, spec.settings.choices, tuple(range(states)))
        with naive:
            expected = naive_unit(sweep, name, spec.settings.choices, states)
        difference = np.abs(found.mass + found.attribution - expected)
        differences.append(float((difference / (np.abs(expected) + 1e-4)).max()))
    # The naive loop computes the full-precision evidence once per layer and state; a sweep would keep it.
    passes = len(spec.settings.choices) + 1
    naive_cpu_s = naive.cpu_s * len(spec.settings.choices) / passes
    return {
        "layers": len(names),
        "states": states,
        "naive_cpu_s": naive_cpu_s,
        "naive_wall_s": naive.wall_s * len(spec.settings.choices) / passes,
        "exact_cpu_s": exact.cpu_s,
        "exact_wall_s": exact.wall_s,
        "cpu_ratio": exact.cpu_s / naive_cpu_s,
        "largest_relative_difference": float(np.max(differences)),
        "peak_rss_growth_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before_bytes,
        "policy_bytes": sum(parameter.nbytes for parameter in sweep.policy.parameters()),
    }


@dataclass(frozen=True)
class Replay:
    """A finished exact table whose evaluations are looked up. losses: [U, B, N], Eq. (9); first_order: the same, first
    order; phases: [N]."""

    table: Sensitivity
    choices: tuple[Choice, ...]
    losses: np.ndarray
    first_order: np.ndarray
    phases: np.ndarray

    def of(self, states: np.ndarray) -> "Replay":
        """The table of some of the states."""
        return replace(
            self,
            losses=self.losses[..., states],
            first_order=self.first_order[..., states],
            phases=self.phases[states],
        )

    def screen(self, settings: ScreenSettings) -> ScreenResult:
        problem = ScreenProblem(
            params=np.asarray([unit.params for unit in self.table.units], float),
            stages=[unit.stage for unit in self.table.units],
            groups=[unit.group for unit in self.table.units],
            bits=tuple(choice.format.weight_bits for choice in self.choices),
            first_order=self.first_order,
            phases=self.phases,
            alpha=Objective().alpha,
            beta=Objective().beta,
        )
        return Screen(problem, settings, lambda requests: [self._look_up(request) for request in requests]).run()

    def _look_up(self, request: Request) -> np.ndarray:
        found: np.ndarray = self.losses[request.unit, request.column, list(request.states)]
        return found

    def scored(self, omega: np.ndarray, omega_tau: np.ndarray) -> Sensitivity:
        """The table with these scores [U, B]."""
        return replace(self.table, units=tuple(_with(self.table.units, self.choices, omega, omega_tau)))

    def scored_by(self, losses: np.ndarray) -> Sensitivity:
        return self.scored(losses.mean(-1), temporal_score(losses, self.phases))


def load_replay(spec: SweepSpec, table: Sensitivity) -> Replay:
    """Reads the exact losses and computes the first-order ones with the table's own settings.

    Raises ArtefactError for a table of another policy or calibration set.
    """
    inputs = {
        "policy_sha256": sha256_policy(spec.policy),
        "calibration_sha256": load_calibration(spec.calibration).sha256,
    }
    if changed := difference({key: table.meta["identity"][key] for key in inputs}, inputs):
        raise ArtefactError(f"{table.path}: was measured with other inputs ({changed}); measure it again")
    tensors = load_tensors(table, "losses")
    choices = [Choice.from_json(raw) for raw in table.meta["identity"]["choices"]]
    settings = SweepSettings(tuple(choices), **table.meta["identity"]["settings"])
    spec = replace(spec, settings=settings)
    found = first_order(spec.open(), [unit.name for unit in table.units], evidence=True)
    return Replay(
        table,
        settings.choices,
        tensors["soft_bottleneck"].astype(np.float64),
        np.stack([soft_bottleneck(np.abs(item.mass), float(table.meta["kappa"])) for item in found]),
        phase_of(tensors["progress"], int(table.meta["bins"])),
    )


def compare_screened(whole: Replay, repeats: int, cap: float) -> dict[str, Any]:
    """Screens the table with `repeats` seeds, on all states and on random halves of them: how far the plans are from
    exhaustive ones."""
    states = whole.losses.shape[-1]
    every, halves = [], []
    for seed in tqdm(range(repeats), desc="screened", unit="seed"):
        settings = ScreenSettings(targets=TARGETS, cap=cap, seed=seed)
        every.append(screened_row(whole, settings))
        half = np.sort(np.random.default_rng(seed).choice(states, states // 2, replace=False))
        halves.append(screened_row(whole.of(half), settings))
    return {"first": every[0], "all_states": _summary(every), "halves": _summary(halves)}


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "within_1_percent": _part(rows, lambda row, target: row["above"][target] <= 0.01),
        "worst_above": {f"{t:g}": max(row["above"][f"{t:g}"] for row in rows) for t in TARGETS},
        "fewest_times_fewer_evaluations": min(row["times_fewer_evaluations"] for row in rows),
        "rows": rows,
    }


def _part(rows: Sequence[dict[str, Any]], holds: Callable[[dict[str, Any], str], bool]) -> dict[str, float]:
    """Per target, the part of the rows of which `holds` is true."""
    return {f"{t:g}": float(np.mean([holds(row, f"{t:g}") for row in rows])) for t in TARGETS}


def screened_row(replay: Replay, settings: ScreenSettings) -> dict[str, Any]:
    """One screening; the exact objectives of its plans, and of those of the first-order scores alone, above the
    exhaustive plans'."""
    exact = replay.scored_by(replay.losses)
    result = replay.screen(settings)
    found = {
        "above": replay.scored(result.omega, result.omega_tau),
        "first_order_alone_above": replay.scored_by(replay.first_order),
    }
    best = {target: plan_score(exact, exact, target) for target in TARGETS}
    above = {
        key: {f"{t:g}": plan_score(table, exact, t) / best[t] - 1 for t in TARGETS} for key, table in found.items()
    }
    times = replay.losses.size / result.record["evaluations"]
    return {"times_fewer_evaluations": times, **above, "reason": result.record["reason"]}


def _with(
    units: Sequence[UnitScores], choices: Sequence[Choice], omega: np.ndarray, omega_tau: np.ndarray
) -> list[UnitScores]:
    return [
        replace(
            unit,
            omega=dict(zip(choices, omega[row].tolist(), strict=True)) | {FULL: 0.0},
            omega_tau=dict(zip(choices, omega_tau[row].tolist(), strict=True)) | {FULL: 0.0},
        )
        for row, unit in enumerate(units)
    ]


def plan_score(by: Sensitivity, priced: Sensitivity, target: float) -> float:
    """The certified plan of one table, priced by another."""
    plan = Planner.of(by, PlanRequest(Limits(average_bits=target))).plan()
    objective = Objective()
    return sum(objective.score(unit, plan.assignment[unit.name]) for unit in priced.units)


def compare_held(spec: SweepSpec) -> dict[str, Any]:
    """Tables of weights held in float32 and in bfloat16, of all layers on all states."""
    with tempfile.TemporaryDirectory() as scratch:
        tables = [
            measure(
                replace(spec, settings=replace(spec.settings, dtype=dtype)),
                Path(scratch) / f"{dtype}.json",
                ScoreSettings(bins=1),
                RunOptions(),
            )
            for dtype in ("float32", "bfloat16")
        ]
    wide, narrow = tables
    ratios = {
        str(choice): [narrow.units[row].omega[choice] / unit.omega[choice] for row, unit in enumerate(wide.units)]
        for choice in spec.settings.choices
    }
    return {
        "states": wide.meta["calibration"]["samples"],
        "median_score_ratio": {choice: float(np.median(values)) for choice, values in ratios.items()},
        "largest_score_difference": max(abs(value - 1) for values in ratios.values() for value in values),
        "plans_above": {
            f"{t:g}": plan_score(narrow, wide, t) / plan_score(wide, wide, t) - 1 for t in TARGETS
        },
        "noise_floor": {table.meta["dtype"]: table.noise_floor for table in tables},
        "median_score": {
            str(choice): float(np.median([unit.omega[choice] for unit in wide.units]))
            for choice in spec.settings.choices
        },
        "policy_bytes": {table.meta["dtype"]: table.meta["cost"]["policy_bytes"] for table in tables},
        "seconds": {table.meta["dtype"]: table.meta["cost"]["seconds"] for table in tables},
    }


def _without_rows(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "rows"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--unnorm-key", help="which of the policy's statistics (default: the only ones)")
    parser.add_argument("--out", type=Path, required=True, help="JSON with all figures")
    parser.add_argument(
        "--choices", nargs="+", default=["w2a16_g64:rtn", "w4a16_g64:rtn", "w8a16_g64:rtn"], help="what is timed"
    )
    parser.add_argument("--stride", type=int, default=6, help="every n-th layer is timed")
    parser.add_argument("--states", type=int, default=8, help="states that are timed")
    parser.add_argument("--table", type=Path, help="finished exact sensitivity.json, for the screened mode")
    parser.add_argument("--seeds", type=int, default=20, help="screenings, each of all states and of a random half")
    parser.add_argument("--cap", type=float, default=0.1, help="screened: largest part of all evaluations")
    parser.add_argument("--held", action="store_true", help="bfloat16 beside float32, on all states: give a small set")
    args = parser.parse_args(argv)

    def command() -> int:
        check_file(args.out, _KIND, [args.policy, args.calibration, args.table])
        settings = SweepSettings(parse_choices(args.choices), unnorm_key=args.unnorm_key)
        spec = SweepSpec(str(args.policy), str(args.calibration), settings, batch_size=16)
        content: dict[str, Any] = {"schema_version": 1, "kind": _KIND}
        content["exact"] = compare_exact(spec, args.stride, args.states)
        if args.held:
            content["bfloat16"] = compare_held(spec)
        if args.table:
            with Clock() as clock:
                replay = load_replay(spec, Sensitivity.load(args.table))
            content["first_order_cpu_s"] = clock.cpu_s
            content["screened"] = compare_screened(replay, args.seeds, args.cap)
        write_json(args.out, content)
        shown = {key: _without_rows(value) for key, value in content.get("screened", {}).items()}
        print(json.dumps(content | {"screened": shown}, indent=1))
        return 0

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
