"""One sensitivity run: what is to be measured, what is already on disk, and the artefact at the end."""

import platform
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from calibrator.conventions.check import Outcome, check
from calibrator.families import Policy, live_units
from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.executors import Executor, LocalExecutor, RayExecutor, Task
from calibrator.sensitivity.journal import Journal, difference
from calibrator.sensitivity.maps import evidence_maps, pick_samples, pick_units
from calibrator.sensitivity.proxy import FirstOrder, first_order
from calibrator.sensitivity.scores import ScoreSettings, evidence_loss, phase_of, soft_bottleneck
from calibrator.sensitivity.screening import Request, Screen, ScreenProblem, ScreenSettings
from calibrator.sensitivity.states import States, reference
from calibrator.sensitivity.sweep import Sweep, SweepSpec, UnitLosses
from calibrator.sensitivity.table import (
    KIND,
    SCHEMA_VERSION,
    Estimate,
    Objective,
    Sensitivity,
    UnitShape,
    inversions,
    score_unit,
    shown_first,
    stack_losses,
    write_tensors,
)
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.files import read_json, sha256_policy, write_json
from vla_policy.core.formats import FULL, Choice
from vla_policy.core.outputs import check_file

_MAP_SAMPLES = 3
_SMALL_PARAMS = 100_000_000


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out. Only `screen` changes the numbers (the others within rounding): with it, most scores
    are estimates. threads: of torch in this process; None takes 1 for a small policy, whose layers are over before
    a second thread has woken up, and torch's own choice otherwise. accept_conventions: go on where the states would
    fit the policy clearly better under another convention.
    """

    executor: str = "local"
    ray_address: str | None = None
    cpus_per_task: int = 1
    resume: bool = True
    unit_globs: tuple[str, ...] = ("*",)
    screen: ScreenSettings | None = None
    threads: int | None = None
    accept_conventions: bool = False
    progress: Callable[..., Any] = tqdm


def unit_shapes(policy: Policy, states: States) -> list[UnitShape]:
    """Every live layer with its cost per action on these states."""
    return [
        UnitShape(
            name=unit.name,
            label=unit.label,
            stage=unit.stage,
            track=unit.track,
            segment=unit.segment,
            kind=unit.kind,
            group=unit.group,
            inputs=unit.params // unit.module.weight.shape[0],
            outputs=unit.module.weight.shape[0],
            macs=round(unit.params * unit.tokens(states.mean_prompt_tokens, states.decisions.size)),
        )
        for unit in live_units(policy)
    ]


def choose_units(shapes: Sequence[UnitShape], globs: Sequence[str]) -> list[UnitShape]:
    """The layers whose names match one of `globs`. Raises PolicyError for a glob that matches none."""
    for glob in globs:
        if not any(fnmatchcase(shape.name, glob) for shape in shapes):
            raise PolicyError(f"--units {glob!r} matches no layer; names look like {shapes[0].name}")
    return [shape for shape in shapes if any(fnmatchcase(shape.name, glob) for glob in globs)]


def signature_of(
    spec: SweepSpec, policy_sha256: str, calibration_sha256: str, screen: ScreenSettings | None
) -> dict[str, Any]:
    """Everything that the losses per state depend on, apart from rounding, and how they are chosen."""
    return {
        "policy_sha256": policy_sha256,
        "calibration_sha256": calibration_sha256,
        "settings": spec.settings.to_json(),
        "screen": None if screen is None else asdict(screen) | {"targets": list(screen.targets)},
    }


@dataclass(frozen=True)
class _Run:
    """What a finished measurement is written from."""

    spec: SweepSpec
    scores: ScoreSettings
    identity: dict[str, Any]
    sweep: Sweep
    shapes: Sequence[UnitShape]
    chosen: Sequence[UnitShape]
    started_s: float
    conventions: Outcome

    @property
    def states(self) -> States:
        return self.sweep.states


@dataclass(frozen=True)
class _Measured:
    """Records in the order of the chosen layers; with estimates, states that were not evaluated are NaN."""

    records: Sequence[UnitLosses]
    proxies: Sequence[FirstOrder]
    estimates: Sequence[Estimate] | None
    facts: dict[str, Any]


def measure(spec: SweepSpec, out: Path, scores: ScoreSettings, options: RunOptions) -> Sensitivity:
    """Measures the chosen layers, exactly or screened, and writes `out` with its losses and maps.

    Finished layers are kept in a journal beside `out` until the artefact is written, so a killed run continues.
    Raises ArtefactError when `out` or the journal belongs to other inputs (naming the difference), PolicyError when
    the device is not there or its memory does not suffice.
    """
    started_s = time.monotonic()
    for kind, path in {KIND: out, **_tensor_files(out)}.items():
        check_file(path, kind, [Path(spec.policy), Path(spec.calibration)])
    try:
        policy = spec.load_policy()
        with _threads(options.threads or _usual_threads(policy)), spec.arithmetic():
            return _measure(spec, policy, out, scores, options, started_s)
    except torch.OutOfMemoryError as error:
        raise PolicyError(
            f"{spec.device}: not enough memory for the policy and {spec.batch_size} states per pass; use a smaller "
            "--batch-size, or another device. Finished layers are kept"
        ) from error


def _usual_threads(policy: Policy) -> int:
    small = sum(parameter.numel() for parameter in policy.parameters()) < _SMALL_PARAMS
    return 1 if small else torch.get_num_threads()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(
    spec: SweepSpec, policy: Policy, out: Path, scores: ScoreSettings, options: RunOptions, started_s: float
) -> Sensitivity:
    states = spec.load_states(policy)
    signature = signature_of(spec, sha256_policy(spec.policy), states.calibration.sha256, options.screen)
    shapes = unit_shapes(policy, states)
    chosen = choose_units(shapes, options.unit_globs)
    identity = signature | {"scores": asdict(scores), "units": [shape.name for shape in chosen]}
    if options.resume and (done := _finished(out, identity)):
        return done
    folder = journal_folder(out)
    if not options.resume:
        Journal.discard(folder)
    journal = Journal(folder, identity if options.screen else signature)
    found = check(policy, Path(spec.policy), states.calibration, spec.settings.unnorm_key)
    conventions = found.require(options.accept_conventions, "--accept-conventions")
    ref = journal.read_reference()
    if ref is None:
        ref = reference(policy, states, policy.chain(spec.settings.language_block))
        journal.write_reference(ref)
    sweep = Sweep(policy, states, ref, spec.settings)
    run = _Run(spec, scores, identity, sweep, shapes, chosen, started_s, conventions)
    with _executor(run, options) as executor:
        take = _screened if options.screen else _exact
        measured = take(run, executor, journal, options)
    result = _write(run, out, measured)
    Journal.discard(folder)
    return result


def _tensor_files(out: Path) -> dict[str, Path]:
    """Where the arrays of the artefact at `out` go, by their kind."""
    prefix = "" if out.stem == "sensitivity" else f"{out.stem}."
    return {kind: out.with_name(f"{prefix}{kind}.safetensors") for kind in ("losses", "maps")}


def journal_folder(out: Path) -> Path:
    """Where the finished layers of an unfinished run are."""
    return out.with_name(f"{out.stem}.unfinished")


def _finished(out: Path, identity: dict[str, Any]) -> Sensitivity | None:
    """The artefact at `out` if it is of these inputs, None if there is none."""
    if not out.is_file():
        return None
    changed = difference(read_json(out, KIND, SCHEMA_VERSION)["identity"], identity)
    if changed:
        raise ArtefactError(
            f"{out}: was measured with other inputs ({changed}); choose another --out, or replace it with --no-resume"
        )
    return Sensitivity.load(out)


@contextmanager
def _executor(run: _Run, options: RunOptions) -> Iterator[Executor]:
    if options.executor == "local":
        yield LocalExecutor(run.sweep)
        return
    cluster = RayExecutor(run.spec, run.sweep.reference, repr(run.identity), options.ray_address, options.cpus_per_task)
    try:
        yield cluster
    finally:
        cluster.close()


class _Known:
    """Losses of all layers as far as they are known; NaN where they are not."""

    def __init__(self, units: Sequence[str], choices: tuple[Choice, ...], states: int) -> None:
        self._units, self._choices, self._states = list(units), choices, tuple(range(states))
        flat = (len(self._units), len(choices), states)
        deep = (*flat, len(BOUNDARIES))
        shapes = {"mass": deep, "attribution": deep, "action_error": flat, "likelihood": flat}
        self._arrays = {name: np.full(shape, np.nan) for name, shape in shapes.items()}

    def add(self, losses: UnitLosses) -> None:
        unit = self._units.index(losses.unit)
        where = np.ix_([self._choices.index(choice) for choice in losses.choices], losses.samples)
        for name, array in self._arrays.items():
            array[unit][where] = getattr(losses, name)

    def records(self) -> list[UnitLosses]:
        """One per layer, in all choices on all states."""
        return [self.record(unit) for unit in self._units]

    def record(self, unit: str) -> UnitLosses:
        place = self._units.index(unit)
        arrays = {name: array[place] for name, array in self._arrays.items()}
        return UnitLosses(unit, self._choices, self._states, **arrays)


class _Ledger:
    """Evaluates tasks that the journal lacks, and adds all to what is known."""

    def __init__(self, run: _Run, executor: Executor, journal: Journal, options: RunOptions, most: int) -> None:
        """most: evaluations (of a layer in one choice on one state) at the progress bar's end."""
        self.known = _Known([shape.name for shape in run.chosen], run.spec.settings.choices, len(run.states))
        self._states, self._executor, self._journal = run.states, executor, journal
        self._bar = options.progress(total=most, desc="evaluations", unit="state")

    def __enter__(self) -> "_Ledger":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)

    def take(self, tasks: Sequence[Task]) -> None:
        """All tasks, split into batches; every layer of a batch before the next batch."""
        split = [
            Task(task.unit, task.choices, batch) for task in tasks for batch in self._states.split(task.samples)
        ]
        split.sort(key=lambda task: task.samples)
        missing = [task for task in split if self._journal.lacks(task.unit, task.choices, task.samples)]
        self._bar.update(_evaluations(split) - _evaluations(missing))
        for losses in self._executor.run(missing):
            self._journal.write(losses)
            self._bar.update(_evaluations([losses]))
        for task in split:
            self.known.add(self._journal.read(task.unit, task.choices, task.samples))


def _evaluations(items: Sequence[Task] | Sequence[UnitLosses]) -> int:
    return sum(len(item.choices) * len(item.samples) for item in items)


def _exact(run: _Run, executor: Executor, journal: Journal, options: RunOptions) -> _Measured:
    """Every chosen layer in every choice on every state."""
    states = tuple(range(len(run.states)))
    tasks = [Task(shape.name, run.spec.settings.choices, states) for shape in run.chosen]
    with _Ledger(run, executor, journal, options, _evaluations(tasks)) as ledger:
        ledger.take(tasks)
    facts = {"mode": "exact", "exact_evaluations": _evaluations(tasks)}
    proxies = first_order(run.sweep, [shape.name for shape in run.chosen], evidence=False)
    return _Measured(ledger.known.records(), proxies, None, facts)


def _screened(run: _Run, executor: Executor, journal: Journal, options: RunOptions) -> _Measured:
    """Layers, choices and states that `calibrator.sensitivity.screening` asks for; the rest is estimated."""
    assert options.screen is not None
    names, choices = [shape.name for shape in run.chosen], run.spec.settings.choices
    proxies = first_order(run.sweep, names, evidence=True)
    problem = _screen_problem(run, proxies)
    with _Ledger(run, executor, journal, options, int(options.screen.cap * problem.first_order.size)) as ledger:

        def evaluate(requests: Sequence[Request]) -> list[np.ndarray]:
            ledger.take([Task(names[r.unit], tuple(choices[place] for place in r.columns), r.states) for r in requests])
            results = []
            for request in requests:
                record, where = ledger.known.record(names[request.unit]), np.ix_(request.columns, request.states)
                losses = evidence_loss(record.mass[where], record.attribution[where], run.scores.attribution_weight)
                results.append(soft_bottleneck(losses, run.scores.kappa))
            return results

        result = Screen(problem, options.screen, evaluate).run()
    estimates = [Estimate(*rows) for rows in zip(result.omega, result.omega_tau, strict=True)]
    facts = {"mode": "screened", "exact_evaluations": result.record["evaluations"], "screening": result.record}
    return _Measured(ledger.known.records(), proxies, estimates, facts)


def _screen_problem(run: _Run, proxies: Sequence[FirstOrder]) -> ScreenProblem:
    objective = Objective()
    return ScreenProblem(
        params=np.asarray([shape.params for shape in run.chosen], float),
        stages=[shape.stage for shape in run.chosen],
        groups=[shape.group for shape in run.chosen],
        bits=tuple(choice.format.weight_bits for choice in run.spec.settings.choices),
        first_order=np.stack([soft_bottleneck(np.abs(proxy.mass), run.scores.kappa) for proxy in proxies]),
        phases=phase_of(run.states.calibration.progress, run.scores.bins),
        alpha=objective.alpha,
        beta=objective.beta,
    )


def _maps(sweep: Sweep, units: Sequence[Any], scores: ScoreSettings) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    samples = pick_samples(sweep.states.calibration.progress, min(_MAP_SAMPLES, len(sweep.states)))
    return evidence_maps(sweep, pick_units(units, shown_first(sweep.settings.choices)), samples, scores)


def _write(run: _Run, out: Path, measured: _Measured) -> Sensitivity:
    """Scores the records and writes the tensors, then the JSON that names their hashes."""
    progress = run.states.calibration.progress
    phases = phase_of(progress, run.scores.bins)
    estimates: Sequence[Estimate | None] = measured.estimates or [None] * len(run.chosen)
    units = [
        score_unit(shape, record, proxy.action, phases, run.scores, estimate)
        for shape, record, proxy, estimate in zip(
            run.chosen, measured.records, measured.proxies, estimates, strict=True
        )
    ]
    maps, map_axes = _maps(run.sweep, units, run.scores)
    losses = stack_losses(measured.records, [proxy.action for proxy in measured.proxies], progress, run.scores)
    tensors = {"losses": losses, "maps": maps}
    files = {}
    for key, path in _tensor_files(out).items():
        files[key] = {"name": path.name, "sha256": write_tensors(path, tensors[key], key)}
    names = {unit.name for unit in units}
    content = _header(run, phases) | measured.facts | {
        "units": [unit.to_json() for unit in units],
        "unmeasured": [shape.name for shape in run.shapes if shape.name not in names],
        "unquantized_params": _all_params(run) - sum(unit.params for unit in units),
        "stray_states": int(np.count_nonzero(run.sweep.reference.strays)),
        "inversions": inversions(units, run.spec.settings.choices),
        "files": files,
        "maps": map_axes,
        "cost": _cost(run),
    }
    write_json(out, content)
    return Sensitivity.load(out)


def _all_params(run: _Run) -> int:
    return sum(parameter.numel() for parameter in run.sweep.policy.parameters())


def _header(run: _Run, phases: np.ndarray) -> dict[str, Any]:
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
            "phases": np.bincount(phases, minlength=run.scores.bins).tolist(),
        },
        "conventions": run.conventions.to_json(),
        "choices": [choice.to_json() for choice in (*settings.choices, FULL)],
        "kappa": run.scores.kappa,
        "lambda": run.scores.attribution_weight,
        "bins": run.scores.bins,
        "epsilon": settings.epsilon,
        "boundaries": list(BOUNDARIES),
        "language_block": run.sweep.chain.language_block,
        "dtype": settings.dtype,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "vla-deploy": version("vla-deploy"),
        },
    }


def _cost(run: _Run) -> dict[str, Any]:
    """What the run took. peak_device_bytes: of a GPU, allocated to tensors since the process began; else None."""
    device = torch.device(run.spec.device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "seconds": time.monotonic() - run.started_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "policy_bytes": sum(parameter.nbytes for parameter in run.sweep.policy.parameters()),
    }
