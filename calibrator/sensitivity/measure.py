"""One sensitivity run: what is to be measured, what is already on disk, and the artefact at the end.

Everything that can be refused is refused before weights are loaded, which only the executor does.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrator.codes import KeptCodes, Source, Wanted, are_kept, check_source, write_codes
from calibrator.conventions.check import Outcome, check
from calibrator.conventions.deciders import PolicyDecider
from calibrator.data.calibration import load_calibration
from calibrator.families import Policy, live_units
from calibrator.families.loading import check_device
from calibrator.sensitivity.artefact import all_params, tensor_files, write
from calibrator.sensitivity.executors import Executor, LocalExecutor, RayExecutor
from calibrator.sensitivity.journal import Journal, difference
from calibrator.sensitivity.ledger import Ledger, exact, first_order, screened
from calibrator.sensitivity.run import Run, RunOptions, choose_units, signature_of, unit_shapes
from calibrator.sensitivity.scores import ScoreSettings
from calibrator.sensitivity.screening import check_cap
from calibrator.sensitivity.sweep import Sweep, SweepSpec
from calibrator.sensitivity.table import (
    KIND,
    SCHEMA_VERSION,
    Sensitivity,
    UnitShape,
)
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import read_json, sha256_policy
from vla_policy.core.outputs import check_file

_SMALL_PARAMS = 100_000_000
_FEW_STATES = 3


def measure(spec: SweepSpec, out: Path, scores: ScoreSettings, options: RunOptions) -> Sensitivity:
    """Measures the chosen layers, exactly or screened, and writes `out` with its losses and maps.

    Finished evaluations are kept in a journal beside `out` until the artefact is written, so a killed run continues,
    with another batch size too. Raises ArtefactError when `out` or the journal belongs to other inputs (naming the
    difference) or to a run that is not over, PolicyError when the device is not there or its memory does not suffice.
    """
    started_s = time.monotonic()
    for kind, path in {KIND: out, **tensor_files(out)}.items():
        check_file(path, kind, [Path(spec.policy), Path(spec.calibration)])
    policy = spec.empty_policy()
    if options.executor == "local":
        check_device(spec.device)
    states = spec.load_states(policy)
    shapes = unit_shapes(policy, states)
    chosen = choose_units(shapes, options.unit_globs)
    _check_recipes(spec, policy, chosen)
    if options.screen:
        check_cap(options.screen, len(chosen), spec.weight_bits, len(states))
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
        run = Run(spec, scores, options, identity, policy, states, shapes, chosen, started_s)
        _warn_of_phases(run)
        with _executor(run) as executor:
            _keep_codes(run, executor, journal.codes)
            result = _measure(run, out, executor, journal)
        journal.discard()
    return result


def _measure(run: Run, out: Path, executor: Executor, journal: Journal) -> Sensitivity:
    ref = journal.read_reference()
    if ref is None:
        with run.options.progress(total=len(run.states), desc="full precision", unit="state") as bar:
            ref = executor.reference(bar.update)
        journal.write_reference(ref)
    found = journal.read_conventions()
    if found is None:
        (found,) = executor.run([_ConventionsTask(run.spec.policy, run.spec.settings.unnorm_key)], ref)
        journal.write_conventions(found)
    conventions = found.require(run.options.accept_conventions, "--accept-conventions")
    ledger = Ledger(run, executor, journal, ref)
    proxies = first_order(run, executor, journal, ref) if run.options.estimates else None
    take = screened if run.options.screen else exact
    return write(run, out, executor, ref, conventions, take(run, ledger, proxies))


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
    return 1 if all_params(policy) < _SMALL_PARAMS else torch.get_num_threads()


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


def _check_recipes(spec: SweepSpec, policy: Policy, chosen: Sequence[UnitShape]) -> None:
    check_source(_source(spec), _wanted_codes(spec, policy, chosen, Path()))


@dataclass(frozen=True)
class _CodesChore:
    """Writes what is missing of some layers' codes to `folder`, from the policy and the states that the run is of."""

    spec: SweepSpec
    units: tuple[UnitShape, ...]
    folder: Path

    def __str__(self) -> str:
        return f"the codes of {len(self.units)} layers"

    def __call__(self) -> int:
        """The number of layers."""
        self.spec.check_inputs(load_calibration(self.spec.calibration).sha256)
        write_codes(_source(self.spec), _wanted_codes(self.spec, self.spec.empty_policy(), self.units, self.folder))
        return len(self.units)


def _keep_codes(run: Run, executor: Executor, folder: Path) -> None:
    """Each worker takes part of the layers, whole groups, since those of one group are found from the same inputs."""
    missing = {one.unit.group for one in _wanted_codes(run.spec, run.policy, run.chosen, folder) if one.missing}
    if not missing:
        return
    parts: list[list[UnitShape]] = [[] for _ in range(min(executor.workers, len(missing)))]
    for group in sorted(missing, key=lambda group: -sum(shape.params for shape in run.chosen if shape.group == group)):
        smallest = min(parts, key=lambda part: sum(shape.params for shape in part))
        smallest += [shape for shape in run.chosen if shape.group == group]
    chores = [_CodesChore(run.spec, tuple(part), folder) for part in parts]
    with run.options.progress(total=sum(map(len, parts)), desc="codes", unit="layer") as bar:
        for count in executor.prepare(chores):
            bar.update(count)


def _warn_of_phases(run: Run) -> None:
    """Omega_tau is the largest of the phases' means: of few states, one may set it."""
    phases, counts = np.unique(run.phases, return_counts=True)
    if (fewest := int(counts.min())) < _FEW_STATES:
        run.options.say(
            f"note: phase {int(phases[counts.argmin()]) + 1} of {run.scores.bins} has {fewest} "
            f"state{'s' if fewest > 1 else ''}, so that one state can set Omega_tau; collect more states, or use fewer "
            "--bins"
        )


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
def _executor(run: Run) -> Iterator[Executor]:
    options = run.options
    if options.executor == "local":
        yield LocalExecutor(run.spec)
        return
    cluster = RayExecutor(run.spec, repr(run.identity), options.ray_address, options.cpus_per_task)
    try:
        yield cluster
    finally:
        cluster.close()
