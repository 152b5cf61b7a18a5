"""What a comparison runs: YAML whose paths are relative to it.

The first run of a section is its reference: the others are paired with it on the same initial states, and with each
other where the section's `compare` says so. A run that names `uniform`, `average_bits` or `stored_mb` has its weights
made here, from the section's own calibration states.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from calibrator.allocation.options import Pin
from calibrator.modules.chain import Stage
from calibrator.quantizers import needs_statistics, parse_choice, parse_choices
from calibrator.sensitivity.table import Signal
from calibrator.transforms import parse_transform
from evaluation.actors import ActorSpec
from evaluation.benchmarks.registry import BENCHMARKS
from evaluation.rollout import Control, Rollout
from evaluation.tables.arms import Arm, ChannelSignal, Materials
from evaluation.tables.arms import Control as PlanControl
from vla_policy.core.errors import ArtefactError, VlaError
from vla_policy.core.formats import Choice
from vla_policy.core.yaml_fields import meant, read_yaml

_SECTION_KEYS = {
    "name", "title", "benchmark", "policy", "unnorm_key", "tasks", "trials", "seed", "runs", "compare", "calibration",
}  # fmt: skip
_CALIBRATION_KEYS = {"sources", "samples", "choices"}
_BUDGET_KEYS = {"average_bits", "stored_mb"}
_ARM_KEYS = _BUDGET_KEYS | {
    "transform", "signal", "alpha", "beta", "pins", "choices", "method", "keep", "states_seed",
}  # fmt: skip
_RUN_KEYS = {"name", "engine", "uniform", "dtype", "control", "trials"} | _ARM_KEYS
_LAYER_SIGNALS = (*get_args(Signal), *get_args(PlanControl))
_SIGNALS = (*_LAYER_SIGNALS, *get_args(ChannelSignal))


@dataclass(frozen=True)
class PlannedRun:
    """One row: what to roll out and on how many initial states per task. arm: how its weights are made, if here."""

    name: str
    rollout: Rollout
    trials: int
    arm: Arm | None = None


@dataclass(frozen=True)
class Section:
    """Runs on the same tasks; `tasks` empty means all of the benchmark.

    materials: what arms are made from. pairs: names of runs that are compared besides each with the reference.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    runs: tuple[PlannedRun, ...]
    materials: Materials | None = None
    pairs: tuple[tuple[str, str], ...] = ()


def read_config(path: Path) -> list[Section]:
    """The sections of the YAML at `path`.

    Raises ArtefactError naming the entry that is wrong, ContractError for what is no YAML.
    """
    content = read_yaml(path)
    _check_keys(content, {"sections"}, {"sections"}, str(path))
    if not isinstance(content["sections"], list):
        raise ArtefactError(f"{path}: expected a mapping with a list `sections`")
    return [_section(entry, path, f"{path}: sections[{index}]") for index, entry in enumerate(content["sections"])]


def _section(entry: Any, path: Path, where: str) -> Section:
    _check_keys(entry, _SECTION_KEYS, {"name", "title", "benchmark", "policy", "trials", "runs"}, where)
    if entry["benchmark"] not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise ArtefactError(f"{where}.benchmark: {entry['benchmark']!r} is unknown; choose from {known}")
    materials = _materials(entry, path, f"{where}.calibration") if "calibration" in entry else None
    runs = tuple(_run(run, entry, path, f"{where}.runs[{index}]") for index, run in enumerate(entry["runs"]))
    names = [run.name for run in runs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ArtefactError(f"{where}.runs: two runs are called {repeated[0]!r}")
    if materials is None and (asking := [run.name for run in runs if run.arm is not None]):
        raise ArtefactError(f"{where}: run {asking[0]!r} has its weights made, which needs the key 'calibration'")
    pairs = tuple(_pair(pair, names, f"{where}.compare[{i}]") for i, pair in enumerate(entry.get("compare", ())))
    return Section(entry["name"], entry["title"], tuple(entry.get("tasks", ())), runs, materials, pairs)


def _materials(section: dict[str, Any], path: Path, where: str) -> Materials:
    entry = section["calibration"]
    _check_keys(entry, _CALIBRATION_KEYS, _CALIBRATION_KEYS, where)
    choices = _choices(entry["choices"], where)
    folders = tuple(path.parent / folder for folder in entry["sources"])
    return Materials(path.parent / section["policy"], folders, entry["samples"], choices, section.get("unnorm_key"))


def _choices(entry: Any, where: str) -> tuple[Choice, ...]:
    try:
        return parse_choices(entry)
    except VlaError as error:
        raise ArtefactError(f"{where}.choices: {error}") from error


def _pair(entry: Any, names: list[str], where: str) -> tuple[str, str]:
    if not isinstance(entry, list) or len(entry) != 2 or not set(entry) <= set(names):
        raise ArtefactError(f"{where}: expected the names of two runs, got {entry!r}; runs are {', '.join(names)}")
    return entry[0], entry[1]


def _run(entry: Any, section: dict[str, Any], path: Path, where: str) -> PlannedRun:
    _check_keys(entry, _RUN_KEYS, {"name"}, where)
    control = entry.get("control", "none")
    if control not in get_args(Control):
        raise ArtefactError(f"{where}.control: {control!r} is unknown; choose from {', '.join(get_args(Control))}")
    arm = _arm(entry, where)
    alike = arm.uniform if arm else None
    computed = arm is not None and alike is not None and not arm.transform and not needs_statistics(alike.recipe)
    engine = entry.get("engine")
    if engine and arm:
        budgets = "'uniform', 'average_bits' and 'stored_mb'"
        raise ArtefactError(f"{where}: an engine has its formats built in; leave {budgets} out")
    actor = ActorSpec(
        kind="engine" if engine else "policy",
        folder=path.parent / (engine or section["policy"]),
        unnorm_key=section.get("unnorm_key"),
        uniform=alike if computed else None,
        dtype=entry.get("dtype", "float32"),
    )
    rollout = Rollout(section["benchmark"], actor, section.get("seed", 7), control)
    return PlannedRun(entry["name"], rollout, entry.get("trials", section["trials"]), None if computed else arm)


def _arm(entry: dict[str, Any], where: str) -> Arm | None:
    """How the run's weights are made; None where they are left alone."""
    budgets = sorted(_BUDGET_KEYS & set(entry))
    if "uniform" not in entry and not budgets:
        if idle := sorted(_ARM_KEYS & set(entry)):
            raise ArtefactError(f"{where}: key {idle[0]!r} needs 'uniform', 'average_bits' or 'stored_mb' beside it")
        return None
    if "uniform" in entry and (idle := sorted((_ARM_KEYS - {"states_seed", "transform"}) & set(entry))):
        raise ArtefactError(f"{where}: key {idle[0]!r} belongs to a plan; 'uniform' says it all")
    if len(budgets) > 1:
        raise ArtefactError(f"{where}: 'average_bits' and 'stored_mb' are two budgets; leave one out")
    signal = entry.get("signal", Arm.signal)
    if signal not in _SIGNALS:
        raise ArtefactError(f"{where}.signal: {signal!r} is unknown; choose from {', '.join(_SIGNALS)}")
    if signal in _LAYER_SIGNALS and "keep" in entry:
        raise ArtefactError(f"{where}: key 'keep' belongs to the signals {' and '.join(get_args(ChannelSignal))}")
    if unknown := sorted(set(entry.get("keep", ())) - set(get_args(Stage))):
        raise ArtefactError(f"{where}.keep: {unknown[0]!r} is unknown; choose from {', '.join(get_args(Stage))}")
    if signal not in _LAYER_SIGNALS and (idle := sorted({"alpha", "beta", "pins", "stored_mb"} & set(entry))):
        raise ArtefactError(f"{where}: key {idle[0]!r} belongs to a plan of layers; signal {signal!r} knows none")
    try:
        uniform = parse_choice(entry["uniform"]) if "uniform" in entry else None
    except VlaError as error:
        raise ArtefactError(f"{where}.uniform: {error}") from error
    choices = _choices(entry["choices"], where) if "choices" in entry else ()
    try:
        return Arm(
            uniform=uniform,
            transform=None if "transform" not in entry else str(parse_transform(entry["transform"])),
            average_bits=entry.get("average_bits"),
            stored_mb=entry.get("stored_mb"),
            signal=signal,
            alpha=entry.get("alpha", Arm.alpha),
            beta=entry.get("beta", Arm.beta),
            pins=tuple(map(Pin.parse, entry.get("pins", ()))),
            choices=choices,
            method=entry.get("method"),
            keep=tuple(entry.get("keep", Arm.keep)),
            seed=entry.get("states_seed", Arm.seed),
        )
    except VlaError as error:
        raise ArtefactError(f"{where}: {error}") from error


def _check_keys(entry: Any, known: set[str], required: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise ArtefactError(f"{where}: expected a mapping, got {type(entry).__name__}")
    if unknown := sorted(set(entry) - known):
        hint = meant(unknown[0], known) or f"; known: {', '.join(sorted(known))}"
        raise ArtefactError(f"{where}: key {unknown[0]!r} is unknown{hint}")
    if missing := sorted(required - set(entry)):
        raise ArtefactError(f"{where}: key {missing[0]!r} is missing; known: {', '.join(sorted(known))}")
    if empty := [key for key, value in entry.items() if value is None]:
        raise ArtefactError(f"{where}: key {empty[0]!r} has no value")
