"""One sensitivity run: what is to be measured, what is already on disk, and the artefact at the end.

Everything that can be refused is refused before weights are loaded, which only the executor does.
"""

import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from calibrator.codes import KeptCodes, Source, Wanted, are_kept, check_source, write_codes
from calibrator.conventions.check import Outcome, check
from calibrator.conventions.deciders import PolicyDecider
from calibrator.families import Policy, live_units
from calibrator.families.loading import check_device, matrix_names
from calibrator.sensitivity.cost import Macs, shown_time
from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.executors import Executor, LocalExecutor, RayExecutor, Task
from calibrator.sensitivity.journal import Journal, difference
from calibrator.sensitivity.maps import MapsTask, pick_samples, pick_units
from calibrator.sensitivity.proxy import FirstOrder, FirstOrderTask
from calibrator.sensitivity.scores import ScoreSettings, evidence_loss, phase_of, soft_bottleneck
from calibrator.sensitivity.screening import Request, Screen, ScreenProblem, ScreenSettings, check_cap
from calibrator.sensitivity.states import Reference, States
from calibrator.sensitivity.sweep import DTYPES, Sweep, SweepSpec, UnitLosses
from calibrator.sensitivity.table import (
    KIND,
    SCHEMA_VERSION,
    Estimate,
    Objective,
    Sensitivity,
    UnitShape,
    below_floor,
    inversions,
    score_unit,
    shown_first,
    stack_losses,
    write_tensors,
)
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.files import read_json, sha256_folder, sha256_policy, write_json
from vla_policy.core.formats import FULL, Choice, Rounding
from vla_policy.core.outputs import check_file
from vla_policy.core.targets import find_target, no_kernel

_MAP_SAMPLES = 3
_FLOOR_SAMPLES = 2
_SMALL_PARAMS = 100_000_000
_FEW_STATES = 3
# What numbers come from, beside settings and libraries.
_CODE = ("data", "families", "modules", "quantizers", "sensitivity")


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out. Only `screen` changes the numbers (the others within rounding): with it, most scores
    are estimates. first_order: also the action error's first-order estimate, without `screen`. threads: of torch in
    this process; None takes 1 for a small policy, whose layers are over before a second thread has woken up, and
    torch's own choice otherwise. accept_conventions: go on where the states would fit the policy clearly better under
    another convention. say: hears what a user should know before the run is over.
    """

    executor: str = "local"
    ray_address: str | None = None
    cpus_per_task: int = 1
    resume: bool = True
    unit_globs: tuple[str, ...] = ("*",)
    screen: ScreenSettings | None = None
    first_order: bool = False
    threads: int | None = None
    accept_conventions: bool = False
    progress: Callable[..., Any] = tqdm
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)

    @property
    def estimates(self) -> bool:
        """Whether first-order estimates are computed."""
        return self.first_order or self.screen is not None


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


def signature_of(spec: SweepSpec, policy_sha256: str, calibration_sha256: str) -> dict[str, Any]:
    """Everything that the losses of a layer in a choice on a state depend on, apart from rounding."""
    settings = spec.settings.to_json()
    return {
        "policy_sha256": policy_sha256,
        "calibration_sha256": calibration_sha256,
        "settings": {key: value for key, value in settings.items() if key != "choices"},
        "versions": {
            **{name: version(name) for name in ("torch", "transformers", "vla-deploy")},
            "code": sha256_folder(Path(__file__).parents[1], [f"{folder}/**/*.py" for folder in _CODE])[:16],
        },
    }


@dataclass(frozen=True)
class _Run:
    """What a measurement is of. policy: without weights. started_s: by the monotonic clock."""

    spec: SweepSpec
    scores: ScoreSettings
    options: RunOptions
    identity: dict[str, Any]
    policy: Policy
    states: States
    shapes: Sequence[UnitShape]
    chosen: Sequence[UnitShape]
    started_s: float

    @property
    def names(self) -> list[str]:
        return [shape.name for shape in self.chosen]

    @property
    def phases(self) -> np.ndarray:
        return phase_of(self.states.calibration.progress, self.scores.bins)

    @property
    def floor_samples(self) -> tuple[int, ...]:
        """The states on which the noise floor is measured."""
        return tuple(pick_samples(self.states.calibration.progress, min(_FLOOR_SAMPLES, len(self.states))))


@dataclass(frozen=True)
class _Measured:
    """Records in the order of the chosen layers, NaN where nothing was evaluated; first-order estimates and, of a
    screened run, estimated scores where there are any. floor: records of full precision, see `floor`."""

    records: Sequence[UnitLosses]
    floor: Sequence[UnitLosses]
    proxies: Sequence[FirstOrder] | None
    estimates: Sequence[Estimate] | None
    facts: dict[str, Any]


def measure(spec: SweepSpec, out: Path, scores: ScoreSettings, options: RunOptions) -> Sensitivity:
    """Measures the chosen layers, exactly or screened, and writes `out` with its losses and maps.

    Finished evaluations are kept in a journal beside `out` until the artefact is written, so a killed run continues,
    with another batch size too. Raises ArtefactError when `out` or the journal belongs to other inputs (naming the
    difference) or to a run that is not over, PolicyError when the device is not there or its memory does not suffice.
    """
    started_s = time.monotonic()
    for kind, path in {KIND: out, **_tensor_files(out)}.items():
        check_file(path, kind, [Path(spec.policy), Path(spec.calibration)])
    policy = spec.empty_policy()
    if options.executor == "local":
        check_device(spec.device)
    states = spec.load_states(policy)
    shapes = unit_shapes(policy, states)
    chosen = choose_units(shapes, options.unit_globs)
    _check_recipes(spec, policy, chosen)
    if options.screen:
        check_cap(options.screen, len(chosen), _bits(spec), len(states))
    sha256 = sha256_policy(spec.policy), states.calibration.sha256
    signature = signature_of(spec, *sha256)
    identity = signature | {
        "choices": [choice.to_json() for choice in spec.settings.choices],
        "screen": None if options.screen is None else asdict(options.screen) | {"targets": [*options.screen.targets]},
        "first_order": options.first_order,
        "scores": asdict(scores),
        "units": [shape.name for shape in chosen],
    }
    if options.resume and (done := _finished(out, identity)):
        return done
    with (
        _threads(options.threads or _usual_threads(policy)),
        Journal(journal_folder(out), signature, fresh=not options.resume) as journal,
    ):
        spec = replace(spec, codes=str(journal.codes), sha256=sha256)
        run = _Run(spec, scores, options, identity, policy, states, shapes, chosen, started_s)
        _warn_of_phases(run)
        _warn_of_fixed_scales(run)
        _keep_codes(run, journal)
        with _executor(run) as executor:
            result = _measure(run, out, executor, journal)
        journal.discard()
    return result


def _measure(run: _Run, out: Path, executor: Executor, journal: Journal) -> Sensitivity:
    ref = journal.read_reference()
    if ref is None:
        with run.options.progress(total=len(run.states), desc="full precision", unit="state") as bar:
            ref = executor.reference(bar.update)
        journal.write_reference(ref)
    (found,) = executor.run([_ConventionsTask(run.spec.policy, run.spec.settings.unnorm_key)], ref)
    conventions = found.require(run.options.accept_conventions, "--accept-conventions")
    ledger = _Ledger(run, executor, journal, ref)
    proxies = _first_order(run, executor, journal, ref) if run.options.estimates else None
    take = _screened if run.options.screen else _exact
    return _write(run, out, executor, ref, conventions, take(run, ledger, proxies))


@dataclass(frozen=True)
class _ConventionsTask:
    """Whether the states are in the policy's conventions."""

    policy: str
    unnorm_key: str | None

    def __str__(self) -> str:
        return "the check of conventions"

    def __call__(self, sweep: Sweep) -> Outcome:
        return check(PolicyDecider(sweep.policy, Path(self.policy)), sweep.states.calibration, self.unnorm_key)


def _usual_threads(policy: Policy) -> int:
    return 1 if _all_params(policy) < _SMALL_PARAMS else torch.get_num_threads()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wanted_codes(spec: SweepSpec, policy: Policy, chosen: Sequence[UnitShape], folder: Path) -> list[Wanted]:
    units, codes = {unit.name: unit for unit in live_units(policy)}, KeptCodes(folder)
    kept = [choice for choice in spec.settings.choices if are_kept(choice)]
    return [Wanted(units[shape.name], choice, codes.place(choice)) for shape in chosen for choice in kept]


def _source(spec: SweepSpec) -> Source:
    return Source(Path(spec.policy), Path(spec.calibration), spec.settings.unnorm_key)


def _bits(spec: SweepSpec) -> tuple[int, ...]:
    return tuple(choice.format.weight_bits for choice in spec.settings.choices)


def _check_recipes(spec: SweepSpec, policy: Policy, chosen: Sequence[UnitShape]) -> None:
    check_source(_source(spec), _wanted_codes(spec, policy, chosen, Path()))


def _keep_codes(run: _Run, journal: Journal) -> None:
    write_codes(_source(run.spec), _wanted_codes(run.spec, run.policy, run.chosen, journal.codes))


def _warn_of_phases(run: _Run) -> None:
    """Omega_tau is the largest of the phases' means: of few states, one may set it."""
    phases, counts = np.unique(run.phases, return_counts=True)
    if (fewest := int(counts.min())) < _FEW_STATES:
        run.options.say(
            f"note: phase {int(phases[counts.argmin()]) + 1} of {run.scores.bins} has {fewest} "
            f"state{'s' if fewest > 1 else ''}, so that one state can set Omega_tau; collect more states, or use fewer "
            "--bins"
        )


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


def _warn_of_fixed_scales(run: _Run) -> None:
    """What is scored is what runs, but for one rule that is not simulated."""
    target = find_target(run.spec.settings.target) if run.spec.settings.target else None
    for choice in run.spec.settings.choices:
        if target is not None and target.rounding(choice.format) is Rounding.TENSOR:
            run.options.say(
                f"note: {target.name} rounds the activations of {choice} with one fixed scale per tensor; it is "
                "measured with one per token, so its scores are too good"
            )


@contextmanager
def _executor(run: _Run) -> Iterator[Executor]:
    options = run.options
    if options.executor == "local":
        yield LocalExecutor(run.spec)
        return
    cluster = RayExecutor(run.spec, repr(run.identity), options.ray_address, options.cpus_per_task)
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
    """Evaluates what the journal lacks, one choice at a time, shows progress, and says what it will take."""

    def __init__(self, run: _Run, executor: Executor, journal: Journal, ref: Reference) -> None:
        self._run, self._executor, self._journal, self._ref = run, executor, journal, ref
        self._macs = Macs.of(run.policy, run.states, run.spec.settings.language_block)
        self._estimated = False
        self.known = _Known(run.names, run.spec.settings.choices, len(run.states))

    def take(self, tasks: Sequence[Task], bar: Any) -> list[UnitLosses]:
        """Everything that `tasks` ask for, each in one choice; all layers of a batch before the next batch."""
        missing = []
        for task in tasks:
            left = self._journal.missing(task.unit, task.choices[0], task.samples)
            bar.update(self._share(task) - self._share(replace(task, samples=left)))
            missing += [replace(task, samples=left)] if left else []
        self._evaluate(missing, bar)
        found = [self._journal.read(task.unit, task.choices[0], task.samples) for task in tasks]
        for losses in found:
            if losses.choices[0] != FULL:
                self.known.add(losses)
        return found

    def _evaluate(self, tasks: Sequence[Task], bar: Any) -> None:
        batches = [replace(task, samples=batch) for task in tasks for batch in self._run.states.split(task.samples)]
        places = {batch.samples: place for place, batch in reversed(list(enumerate(batches)))}
        batches.sort(key=lambda batch: places[batch.samples])
        before, spent = time.monotonic(), []
        for losses in self._executor.run(batches, self._ref):
            self._journal.write(losses)
            bar.update(self._share(losses))
            spent.append(time.monotonic() - before)
            if len(spent) == 2 and not self._estimated:
                self._say_estimate(batches, spent)

    def _share(self, item: Task | UnitLosses) -> float:
        """What an item weighs on the progress bar, in mean evaluations of a layer in a choice on a state."""
        mean = sum(self._macs.evaluation[name] for name in self._run.names) / len(self._run.names)
        return self._macs.evaluation[item.unit] * len(item.choices) * len(item.samples) / mean

    def _say_estimate(self, batches: Sequence[Task], spent: Sequence[float]) -> None:
        """From the first two evaluations, of which the first pays for the pass that all share."""
        self._estimated = True
        macs = [self._macs.evaluation[batch.unit] * len(batch.samples) for batch in batches]
        if len(batches) < 3 or self._run.options.executor != "local":
            return
        rate = macs[1] / (spent[1] - spent[0])
        shared = max(spent[0] - macs[0] / rate, 0.0)
        seconds = sum(macs) / rate + shared * len({batch.samples for batch in batches})
        usage = self._executor.usage
        self._run.options.say(
            f"estimated from the first layer: {shown_time(seconds)} for "
            f"{sum(len(batch.samples) for batch in batches)} evaluations, {usage.shown if usage else 'memory unknown'} "
            f"(no layer needs more); less: {self._shorter}"
        )

    @property
    def _shorter(self) -> str:
        screened = "" if self._run.options.screen else "--mode screened (a tenth of the evaluations), "
        return f"{screened}fewer states or choices, --executor ray, a GPU; a larger --batch-size if memory allows"


def _exact(run: _Run, ledger: _Ledger, proxies: Sequence[FirstOrder] | None) -> _Measured:
    """Every chosen layer in every choice on every state."""
    states, choices = tuple(range(len(run.states))), run.spec.settings.choices
    tasks = [Task(shape.name, (choice,), states) for shape in run.chosen for choice in choices]
    tasks += _floor_tasks(run)
    with _bar(run, sum(len(task.samples) for task in tasks)) as bar:
        floor = [losses for losses in ledger.take(tasks, bar) if losses.choices[0] == FULL]
    facts = {"mode": "exact", "exact_evaluations": len(run.chosen) * len(choices) * len(states)}
    return _Measured(ledger.known.records(), floor, proxies, None, facts)


def _floor_tasks(run: _Run) -> list[Task]:
    return [Task(shape.name, (FULL,), run.floor_samples) for shape in run.chosen]


def _bar(run: _Run, evaluations: float) -> Any:
    shown = "{desc}: {percentage:5.1f}%|{bar}| {elapsed}<{remaining}"
    # A sum of parts may end a rounding error above the whole.
    return run.options.progress(total=evaluations + 1e-6, desc="evaluations", bar_format=shown)


def _screened(run: _Run, ledger: _Ledger, proxies: Sequence[FirstOrder] | None) -> _Measured:
    """Layers, choices and states that `calibrator.sensitivity.screening` asks for; the rest is estimated."""
    assert run.options.screen is not None and proxies is not None
    names, choices = run.names, run.spec.settings.choices
    problem = _screen_problem(run, proxies)
    floor_tasks = _floor_tasks(run)
    most = int(run.options.screen.cap * problem.first_order.size)
    with _bar(run, most + sum(len(task.samples) for task in floor_tasks)) as bar:

        def evaluate(requests: Sequence[Request]) -> list[np.ndarray]:
            tasks = [Task(names[r.unit], (choices[r.column],), r.states) for r in requests]
            found = ledger.take(tasks, bar)
            return [_loss(losses, run.scores)[0] for losses in found]

        floor = ledger.take(floor_tasks, bar)
        result = Screen(problem, run.options.screen, evaluate).run()
    estimates = [Estimate(*rows) for rows in zip(result.omega, result.omega_tau, strict=True)]
    facts = {"mode": "screened", "exact_evaluations": result.record["evaluations"], "screening": result.record}
    return _Measured(ledger.known.records(), floor, proxies, estimates, facts)


def _loss(losses: UnitLosses, scores: ScoreSettings) -> np.ndarray:
    """L^SB of Eq. (9), [choices, states]."""
    combined = evidence_loss(losses.mass, losses.attribution, scores.attribution_weight)
    return soft_bottleneck(combined, scores.kappa)


def _screen_problem(run: _Run, proxies: Sequence[FirstOrder]) -> ScreenProblem:
    objective = Objective()
    return ScreenProblem(
        params=np.asarray([shape.params for shape in run.chosen], float),
        stages=[shape.stage for shape in run.chosen],
        groups=[shape.group for shape in run.chosen],
        bits=_bits(run.spec),
        first_order=np.stack([soft_bottleneck(np.abs(proxy.mass), run.scores.kappa) for proxy in proxies]),
        phases=run.phases,
        alpha=objective.alpha,
        beta=objective.beta,
    )


def _first_order(run: _Run, executor: Executor, journal: Journal, ref: Reference) -> list[FirstOrder]:
    """First-order estimates of all chosen layers on all states, batch by batch; of the evidence only for screening."""
    names, choices, evidence = run.names, run.spec.settings.choices, run.options.screen is not None
    every = tuple(range(len(run.states)))

    pairs = [(name, choice) for name in names for choice in choices]
    left = {state for pair in pairs for state in journal.missing_first_order(*pair, every, evidence)}
    tasks = [FirstOrderTask(tuple(names), batch, evidence) for batch in run.states.split(sorted(left), alike=True)]
    with run.options.progress(total=len(every), desc="first order", unit="state") as bar:
        bar.update(len(every) - len(left))
        for task, found in executor.run(tasks, ref):
            journal.write_first_order(found, choices, task.samples)
            bar.update(len(task.samples))
    return [journal.read_first_order(name, choices, every) for name in names]


def _write(
    run: _Run, out: Path, executor: Executor, ref: Reference, conventions: Outcome, measured: _Measured
) -> Sensitivity:
    """Scores the records and writes the tensors, then the JSON that names their hashes."""
    progress, choices = run.states.calibration.progress, run.spec.settings.choices
    actions = None if measured.proxies is None else [proxy.action for proxy in measured.proxies]
    nothing: list[None] = [None] * len(run.chosen)
    estimates: Sequence[Estimate | None] = measured.estimates or nothing
    proxies: Sequence[np.ndarray | None] = actions or nothing
    units = [
        score_unit(shape, record, action, run.phases, run.scores, estimate)
        for shape, record, action, estimate in zip(
            run.chosen, measured.records, proxies, estimates, strict=True
        )
    ]
    floor = max(float(_loss(losses, run.scores).mean()) for losses in measured.floor)
    shown = pick_samples(progress, min(_MAP_SAMPLES, len(run.states)))
    ((maps, map_axes),) = executor.run(
        [MapsTask(tuple(pick_units(units, shown_first(choices))), tuple(shown), run.scores)], ref
    )
    tensors = {"losses": stack_losses(measured.records, actions, progress, run.scores), "maps": maps}
    files = {}
    for key, path in _tensor_files(out).items():
        files[key] = {"name": path.name, "sha256": write_tensors(path, tensors[key], key)}
    names = {unit.name for unit in units}
    content = _header(run) | measured.facts | {
        "units": [unit.to_json() for unit in units],
        "conventions": conventions.to_json(),
        "unmeasured": [shape.name for shape in run.shapes if shape.name not in names],
        "unquantized_params": _all_params(run.policy) - sum(unit.params for unit in units),
        "stray_states": int(np.count_nonzero(ref.strays)),
        "noise_floor": {"omega": floor, "samples": list(run.floor_samples)},
        "below_floor": below_floor(units, choices, floor),
        "inversions": inversions(units, choices),
        "files": files,
        "maps": map_axes,
        "cost": _cost(run, executor),
    }
    write_json(out, content)
    return Sensitivity.load(out)


def _all_params(policy: Policy) -> int:
    return sum(parameter.numel() for parameter in policy.parameters())


def _header(run: _Run) -> dict[str, Any]:
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


def _cost(run: _Run, executor: Executor) -> dict[str, Any]:
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
