"""Evaluations of a run: what the journal lacks is measured, exactly or as far as screening asks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calibrator.sensitivity.cost import Macs, shown_time
from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.executors import Executor, Task
from calibrator.sensitivity.journal import Journal
from calibrator.sensitivity.proxy import FirstOrder, FirstOrderTask
from calibrator.sensitivity.run import Run
from calibrator.sensitivity.scores import ScoreSettings, evidence_loss, soft_bottleneck
from calibrator.sensitivity.screening import Request, Screen, ScreenProblem
from calibrator.sensitivity.states import Reference
from calibrator.sensitivity.sweep import UnitLosses
from calibrator.sensitivity.table import Estimate, Objective
from vla_policy.core.formats import FULL, Choice


@dataclass(frozen=True)
class Measured:
    """Records in the order of the chosen layers, NaN where nothing was evaluated; first-order estimates and, of a
    screened run, estimated scores where there are any. floor: records of full precision, see `floor`."""

    records: Sequence[UnitLosses]
    floor: Sequence[UnitLosses]
    proxies: Sequence[FirstOrder] | None
    estimates: Sequence[Estimate] | None
    facts: dict[str, Any]


class Known:
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


class Ledger:
    """Evaluates what the journal lacks, one choice at a time, shows progress, and says what it will take."""

    def __init__(self, run: Run, executor: Executor, journal: Journal, ref: Reference) -> None:
        self._run, self._executor, self._journal, self._ref = run, executor, journal, ref
        self._macs = Macs.of(run.policy, run.states, run.spec.settings.language_block)
        self._estimated = False
        self.known = Known(run.names, run.spec.settings.choices, len(run.states))

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
        before, ended = time.monotonic(), list[tuple[float, float]]()
        for losses in self._executor.run(batches, self._ref):
            self._journal.write(losses)
            bar.update(self._share(losses))
            if not self._estimated:
                ended.append((time.monotonic() - before, self._macs.evaluation[losses.unit] * len(losses.samples)))
                self._estimated = self._say_estimate(batches, ended)

    def _share(self, item: Task | UnitLosses) -> float:
        """What an item weighs on the progress bar, in mean evaluations of a layer in a choice on a state."""
        mean = sum(self._macs.evaluation[name] for name in self._run.names) / len(self._run.names)
        return self._macs.evaluation[item.unit] * len(item.choices) * len(item.samples) / mean

    def _say_estimate(self, batches: Sequence[Task], ended: Sequence[tuple[float, float]]) -> bool:
        """Whether there is something to say, from the evaluations that have ended: seconds and multiply-accumulates.

        Each worker's first one pays for the pass that all share; when one more than there are workers have ended, as
        many as there are workers were carried out since the first.
        """
        workers = self._executor.workers
        if len(ended) <= workers or len(batches) <= 2 * workers:
            return False
        (first, its_macs), *later = ended
        rate = sum(macs for _, macs in later) / max(later[-1][0] - first, 1e-9)
        shared = max(first - its_macs * workers / rate, 0.0)
        macs = sum(self._macs.evaluation[batch.unit] * len(batch.samples) for batch in batches)
        seconds = macs / rate + shared * len({batch.samples for batch in batches})
        usage = self._executor.usage
        each = " in each worker" if workers > 1 else ""
        self._run.options.say(
            f"estimated from the first layer: {shown_time(seconds)} for "
            f"{sum(len(batch.samples) for batch in batches)} evaluations, {usage.shown if usage else 'memory unknown'}"
            f"{each} (no layer needs more); less: {self._shorter}"
        )
        return True

    @property
    def _shorter(self) -> str:
        options = self._run.options
        screened = "" if options.screen else "--mode screened (a tenth of the evaluations), "
        machines = "more machines" if options.executor == "ray" else "--executor ray"
        return f"{screened}fewer states or choices, {machines}, a GPU; a larger --batch-size if memory allows"


def exact(run: Run, ledger: Ledger, proxies: Sequence[FirstOrder] | None) -> Measured:
    """Every chosen layer in every choice on every state."""
    states, choices = tuple(range(len(run.states))), run.spec.settings.choices
    tasks = [Task(shape.name, (choice,), states) for shape in run.chosen for choice in choices]
    tasks += _floor_tasks(run)
    with _bar(run, sum(len(task.samples) for task in tasks)) as bar:
        floor = [losses for losses in ledger.take(tasks, bar) if losses.choices[0] == FULL]
    facts = {"mode": "exact", "exact_evaluations": len(run.chosen) * len(choices) * len(states)}
    return Measured(ledger.known.records(), floor, proxies, None, facts)


def _floor_tasks(run: Run) -> list[Task]:
    return [Task(shape.name, (FULL,), run.floor_samples) for shape in run.chosen]


def _bar(run: Run, evaluations: float) -> Any:
    shown = "{desc}: {percentage:5.1f}%|{bar}| {elapsed}<{remaining}"
    # A sum of parts may end a rounding error above the whole.
    return run.options.progress(total=evaluations + 1e-6, desc="evaluations", bar_format=shown)


def screened(run: Run, ledger: Ledger, proxies: Sequence[FirstOrder] | None) -> Measured:
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
            return [loss_of(losses, run.scores)[0] for losses in found]

        floor = ledger.take(floor_tasks, bar)
        result = Screen(problem, run.options.screen, evaluate).run()
    estimates = [Estimate(*rows) for rows in zip(result.omega, result.omega_tau, strict=True)]
    facts = {"mode": "screened", "exact_evaluations": result.record["evaluations"], "screening": result.record}
    return Measured(ledger.known.records(), floor, proxies, estimates, facts)


def loss_of(losses: UnitLosses, scores: ScoreSettings) -> np.ndarray:
    """L^SB of Eq. (9), [choices, states]."""
    combined = evidence_loss(losses.mass, losses.attribution, scores.attribution_weight)
    return soft_bottleneck(combined, scores.kappa)


def _screen_problem(run: Run, proxies: Sequence[FirstOrder]) -> ScreenProblem:
    objective = Objective()
    return ScreenProblem(
        params=np.asarray([shape.params for shape in run.chosen], float),
        stages=[shape.stage for shape in run.chosen],
        groups=[shape.group for shape in run.chosen],
        bits=run.spec.weight_bits,
        first_order=np.stack([soft_bottleneck(np.abs(proxy.mass), run.scores.kappa) for proxy in proxies]),
        phases=run.phases,
        alpha=objective.alpha,
        beta=objective.beta,
    )


def first_order(run: Run, executor: Executor, journal: Journal, ref: Reference) -> list[FirstOrder]:
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
