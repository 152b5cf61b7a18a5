"""What a report is made from: artefacts, read and checked against each other, each with where it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from calibrator.allocation.plan import Plan
from calibrator.data.calibration import CalibrationSet, load_calibration
from calibrator.report.artefacts import Frontier, Parity, ReferenceDecisions, Rollout, ServedRun
from calibrator.sensitivity.table import Sensitivity, load_tensors
from vla_policy.core.bench import Bench
from vla_policy.core.contract import Contract, load_contract
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file, sha256_folder
from vla_policy.core.formats import Choice
from vla_policy.core.manifest import MANIFEST, Manifest
from vla_policy.core.verification import Verification

COMMANDS = {
    "sensitivity": "python -m calibrator sensitivity --policy P --calibration C --out sensitivity.json",
    "calibration": "python -m calibrator collect BAG --contract CONTRACT.yaml --out calibration",
    "plan": "python -m calibrator allocate --sensitivity sensitivity.json --average-bits 4 --out plan.json",
    "frontier": "python -m calibrator allocate ... --frontier frontier.json",
    "engine": "python -m engine_build build --policy P --plan plan.json --target cpu --out engine",
    "verification": "python -m engine_build verify engine --policy P --calibration C --out verification.json",
    "reference_engine": "python -m engine_build build --policy P --uniform w16a16 --target cpu --out reference",
    "bench": "python -m engine_build bench engine --against reference --out bench.json",
    "served": "python -m demo.serving --engine engine --bag BAG --contract CONTRACT.yaml --out served.json",
    "decisions": "python -m demo.pipeline --out OUT",
    "parity": "python -m demo.pipeline --out OUT",
    "rollout": "python -m evaluation rollout --engine engine --benchmark NAME --out rollout.json",
}
"""The command that makes each kind of artefact."""


@dataclass(frozen=True)
class Paths:
    """Where the artefacts are; only the sensitivity is required."""

    sensitivity: Path
    plan: Path | None = None
    frontier: Path | None = None
    calibration: Path | None = None
    engine: Path | None = None
    verification: Path | None = None
    reference_engine: Path | None = None
    bench: Path | None = None
    served: Path | None = None
    decisions: Path | None = None
    parity: Path | None = None
    contract: Path | None = None
    rollouts: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Source:
    """One artefact: its file's name, its sha256, and the command that makes its kind."""

    file: str
    sha256: str
    command: str

    @property
    def short(self) -> str:
        return self.sha256[:10]

    @property
    def program(self) -> str:
        """The command without its options."""
        words = self.command.split()
        return " ".join(words[:4] if words[3].islower() and words[3].isalpha() else words[:3])


@dataclass(frozen=True)
class Maps:
    """Evidence over the image. evidence: float32 [units, states, choices, patches]; loss: [units, states, choices].

    choices: full precision first. samples: indices into the calibration set.
    """

    evidence: np.ndarray
    loss: np.ndarray
    units: tuple[str, ...]
    samples: tuple[int, ...]
    choices: tuple[Choice, ...]
    grid: tuple[int, int]


@dataclass(frozen=True)
class Inputs:
    """Everything that was given, with its sources by kind."""

    sensitivity: Sensitivity
    losses: Mapping[str, np.ndarray]
    maps: Maps | None
    sources: Mapping[str, Source]
    plan: Plan | None = None
    frontier: Frontier | None = None
    calibration: CalibrationSet | None = None
    engine: Manifest | None = None
    verification: Verification | None = None
    reference_engine: Manifest | None = None
    bench: Bench | None = None
    served: ServedRun | None = None
    decisions: ReferenceDecisions | None = None
    parity: Parity | None = None
    contract: Contract | None = None
    rollouts: tuple[Rollout, ...] = field(default=())

    @staticmethod
    def load(paths: Paths) -> "Inputs":
        """Reads everything. Raises ArtefactError for a file that is unusable or was made from another parent."""
        sensitivity = Sensitivity.load(paths.sensitivity)
        inputs = Inputs(
            sensitivity=sensitivity,
            losses=load_tensors(sensitivity, "losses"),
            maps=_maps(sensitivity),
            sources=_sources(paths, sensitivity),
            plan=Plan.load(paths.plan) if paths.plan else None,
            frontier=Frontier.load(paths.frontier) if paths.frontier else None,
            calibration=load_calibration(paths.calibration) if paths.calibration else None,
            engine=Manifest.load(paths.engine) if paths.engine else None,
            verification=Verification.load(paths.verification) if paths.verification else None,
            reference_engine=Manifest.load(paths.reference_engine) if paths.reference_engine else None,
            bench=Bench.load(paths.bench) if paths.bench else None,
            served=ServedRun.load(paths.served) if paths.served else None,
            decisions=ReferenceDecisions.load(paths.decisions) if paths.decisions else None,
            parity=Parity.load(paths.parity) if paths.parity else None,
            contract=load_contract(paths.contract) if paths.contract else None,
            rollouts=tuple(Rollout.load(path) for path in paths.rollouts),
        )
        _check_parents(inputs, paths)
        return inputs


def _maps(sensitivity: Sensitivity) -> Maps | None:
    axes = sensitivity.meta.get("maps")
    if not axes:
        return None
    tensors = load_tensors(sensitivity, "maps")
    height, width = axes["grid"]
    by_text = {str(choice): choice for choice in sensitivity.choices}
    return Maps(
        tensors["evidence"],
        tensors["loss"],
        tuple(axes["units"]),
        tuple(axes["samples"]),
        tuple(by_text[text] for text in axes["choices"]),
        (height, width),
    )


def _sources(paths: Paths, sensitivity: Sensitivity) -> dict[str, Source]:
    files = {
        "plan": paths.plan,
        "frontier": paths.frontier,
        "calibration": paths.calibration / "calibration.json" if paths.calibration else None,
        "engine": paths.engine / MANIFEST if paths.engine else None,
        "verification": paths.verification,
        "reference_engine": paths.reference_engine / MANIFEST if paths.reference_engine else None,
        "bench": paths.bench,
        "served": paths.served,
        "decisions": paths.decisions,
        "parity": paths.parity,
    }
    files |= {f"rollout {number}": path for number, path in enumerate(paths.rollouts, 1)}
    found = {"sensitivity": Source(paths.sensitivity.name, sensitivity.sha256, COMMANDS["sensitivity"])}
    for which in ("losses", "maps"):
        if entry := sensitivity.meta["files"].get(which):
            found[which] = Source(entry["name"], entry["sha256"], COMMANDS["sensitivity"])
    for kind, path in files.items():
        if path is not None:
            name = f"{path.parent.name}/{path.name}" if path.name in (MANIFEST, "calibration.json") else path.name
            found[kind] = Source(name, sha256_file(path), COMMANDS[kind.split()[0]])
    return found


def _check_parents(inputs: Inputs, paths: Paths) -> None:
    """Every artefact must belong to the others that were given."""
    sensitivity, policy = inputs.sensitivity, inputs.sensitivity.policy_sha256
    checks: list[tuple[Path | None, str, str, str]] = []
    if inputs.plan:
        parent = inputs.plan.details["parents"]["sensitivity_sha256"]
        checks.append((paths.plan, "the sensitivity", parent, sensitivity.sha256))
    if inputs.frontier:
        checks.append((paths.frontier, "the sensitivity", inputs.frontier.sensitivity_sha256, sensitivity.sha256))
    if inputs.calibration:
        measured_on = sensitivity.calibration_sha256
        checks.append((paths.sensitivity, "the calibration set", measured_on, inputs.calibration.sha256))
    if inputs.engine:
        checks.append((paths.engine, "the policy", inputs.engine.parents["policy"], policy))
    if inputs.engine and inputs.plan:
        built_from = inputs.engine.parents.get("plan", "none")
        checks.append((paths.engine, "the plan", built_from, inputs.sources["plan"].sha256))
    if inputs.verification:
        checks.append((paths.verification, "the policy", inputs.verification.parents["policy"], policy))
        if inputs.engine:
            of, given = inputs.verification.parents["engine"], inputs.sources["engine"].sha256
            checks.append((paths.verification, "the engine", of, given))
    if inputs.reference_engine:
        checks.append((paths.reference_engine, "the policy", inputs.reference_engine.parents["policy"], policy))
    if inputs.served and inputs.engine:
        checks.append((paths.served, "the engine", inputs.served.engine_sha256, inputs.sources["engine"].sha256))
    if inputs.decisions and inputs.reference_engine:
        decided_by, given_engine = inputs.decisions.engine_sha256, inputs.sources["reference_engine"].sha256
        checks.append((paths.decisions, "the 16-bit engine", decided_by, given_engine))
    checks += _bench_checks(inputs, paths)
    checks += _rollout_checks(inputs, paths)
    for path, what, made_from, given in checks:
        if made_from != given:
            raise ArtefactError(
                f"{path}: was made with {what} {made_from[:12]}, the report was given {given[:12]}; "
                "give the files of one run, or make this one again"
            )


def _bench_checks(inputs: Inputs, paths: Paths) -> list[tuple[Path | None, str, str, str]]:
    """A bench must be of the policy, and of the plan and the engines that were given."""
    bench, sources = inputs.bench, inputs.sources
    if bench is None:
        return []
    checks = [("the policy", bench.parents["policy"], inputs.sensitivity.policy_sha256)]
    if inputs.plan:
        checks.append(("the plan", bench.parents.get("plan", "none"), sources["plan"].sha256))
    if inputs.engine:
        checks.append(("the engine", bench.engine.sha256, sources["engine"].sha256))
    if inputs.reference_engine:
        given = sources["reference_engine"].sha256
        measured = [figures.sha256 for figures in bench.references]
        checks.append(("the 16-bit engine", given if given in measured else measured[0], given))
    return [(paths.bench, *check) for check in checks]


def _rollout_checks(inputs: Inputs, paths: Paths) -> list[tuple[Path | None, str, str, str]]:
    """A rollout must be of the policy, or of an engine that was given, if one was."""
    engines = [sha256_folder(folder) for folder in (paths.engine, paths.reference_engine) if folder]
    checks: list[tuple[Path | None, str, str, str]] = []
    for path, rollout in zip(paths.rollouts, inputs.rollouts, strict=True):
        if rollout.kind == "policy":
            checks.append((path, "the policy", rollout.actor_sha256, inputs.sensitivity.policy_sha256))
        elif engines and rollout.actor_sha256 not in engines:
            checks.append((path, "the engine", rollout.actor_sha256, engines[0]))
    return checks
