"""The page: every section whose artefacts were given, and how to add the others."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from calibrator.conventions.check import Outcome
from calibrator.report import (
    charts_conventions,
    charts_engine,
    charts_layers,
    charts_plan,
    charts_served,
    charts_time,
    numbers,
    plan_facts,
)
from calibrator.report.evidence_images import evidence_blocks, photos
from calibrator.report.inputs import COMMANDS, Inputs
from calibrator.report.labels import Labels
from calibrator.sensitivity.table import shown_first
from vla_policy.core.formats import FULL, Choice

_FOLDER = Path(__file__).parent / "templates"
_TOP = 20
_PAIR = Markup('<div class="pair">{}{}</div>')


@dataclass(frozen=True)
class ByChoice:
    """One drawing per measured choice, with its label; `shown` is the label of the one that is seen first."""

    charts: tuple[tuple[str, Markup], ...]
    shown: str


@dataclass(frozen=True)
class Section:
    """One section: its anchor, its heading, its template's variables."""

    key: str
    title: str
    variables: dict[str, Any]


@dataclass(frozen=True)
class Missing:
    """A section that is absent: what it would show, the option that adds it, the command that makes its artefact."""

    what: str
    option: str
    command: str


def render(inputs: Inputs) -> str:
    """The page as one HTML document."""
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "data": numbers.data,
        "size": numbers.size,
        "percent": numbers.percent,
        "evaluated": numbers.evaluated,
        "layer": {unit.name: unit.label for unit in inputs.sensitivity.units}.__getitem__,
        "given": lambda kinds: [inputs.sources[kind] for kind in kinds if kind in inputs.sources],
    }
    environment.globals |= {"sources": inputs.sources}
    choices = _choices(inputs)
    sections = [section for make in _SECTIONS if (section := make(inputs)) is not None]
    return environment.get_template("page.html").render(
        inputs=inputs,
        choices=list(map(Labels.of(choices), choices)),
        facts=plan_facts.plan_facts(inputs.plan, inputs.sensitivity) if inputs.plan else None,
        sections=sections,
        headline_sources=["plan", "sensitivity", "bench", "served", *(k for k in inputs.sources if "rollout" in k)],
        missing=_missing(inputs),
        css=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
        script=Markup((_FOLDER / "page.js").read_text(encoding="utf-8")),
        version=version("vla-deploy"),
    )


def _choices(inputs: Inputs) -> list[Choice]:
    """What was measured below full precision: the rows of the loss arrays."""
    return [choice for choice in inputs.sensitivity.choices if choice != FULL]


def _by_choice(inputs: Inputs, charts: Sequence[Markup]) -> ByChoice:
    """Charts in the order of the choices."""
    choices = _choices(inputs)
    label = Labels.of(choices)
    labelled = zip(map(label, choices), charts, strict=True)
    return ByChoice(tuple(labelled), label(shown_first(choices)))


def _evidence(inputs: Inputs) -> Section | None:
    if inputs.maps is None:
        return None
    blocks = evidence_blocks(inputs.maps, inputs.losses["progress"], inputs.calibration)
    boundary = inputs.sensitivity.meta["maps"]["boundary"]
    pictures = photos(inputs.maps, inputs.calibration) if inputs.calibration else ()
    variables = {"blocks": blocks, "boundary": boundary, "photos": pictures}
    return Section("evidence", "Where evidence moves on the image", variables)


def _conventions(inputs: Inputs) -> Section | None:
    raw = inputs.sensitivity.meta.get("conventions")
    outcome = Outcome.from_json(raw) if raw else None
    if outcome is None or not outcome.trials:
        return None
    variables = {"outcome": outcome, "chart": charts_conventions.conventions_chart(outcome)}
    return Section("conventions", "Are the states as the policy knows them", variables)


def _layers(inputs: Inputs) -> Section:
    units, choices = inputs.sensitivity.units, _choices(inputs)
    shown, label = shown_first(choices), Labels.of(choices)
    pairs = [
        _PAIR.format(
            charts_layers.boundary_chart(units, choice, label(choice)),
            charts_layers.error_chart(units, choice, label(choice)),
        )
        for choice in choices
    ]
    known = [unit for unit in units if unit.evaluated(shown)]
    errors = [unit.action_mse[shown] for unit in known]
    correlation = charts_layers.rank_correlation([unit.omega[shown] for unit in known], errors)
    total = sum(unit.omega[shown] for unit in units)
    ranked = sorted(units, key=lambda unit: -unit.omega[shown])
    return Section(
        "layers",
        "Which layers are fragile",
        {
            "chart": charts_layers.layer_chart(units, choices, inputs.plan),
            "pair": _by_choice(inputs, pairs),
            "shown": shown,
            "label": label,
            "top": ranked[:_TOP],
            "share_of_top": sum(unit.omega[shown] for unit in ranked[:_TOP]) / total if total else None,
            "known": len(known),
            "correlation": correlation if np.isfinite(correlation) else None,
            "moves_actions": any(errors),
            "missed": charts_layers.disagreement(known, shown, _TOP),
            "choices": choices,
            "evaluations": inputs.losses["soft_bottleneck"].size,
        },
    )


def _time(inputs: Inputs) -> Section:
    units, losses, bins = inputs.sensitivity.units, inputs.losses, int(inputs.sensitivity.meta["bins"])
    choices = _choices(inputs)
    label = Labels.of(choices)
    # Screening leaves out most layers of most states: means over layers would compare different layers.
    complete = bool(np.isfinite(losses["loss"]).all())
    counts = np.bincount(losses["phase"], minlength=bins).tolist()

    def draw(row: int, choice: Choice) -> Markup:
        heat = charts_time.heat_chart(units, losses, row, bins, choice, label(choice), _TOP)
        if not complete:
            return heat
        bands = charts_time.phase_bands(losses, row, bins)
        return _PAIR.format(charts_time.band_chart(bands, counts, label(choice)), heat)

    charts = [draw(row, choice) for row, choice in enumerate(choices)]
    variables = {"charts": _by_choice(inputs, charts), "bins": bins, "empty": counts.count(0), "complete": complete}
    return Section("time", "When in the task", variables)


def _plan(inputs: Inputs) -> Section | None:
    plan, sensitivity = inputs.plan, inputs.sensitivity
    if plan is None:
        return None
    facts = plan_facts.plan_facts(plan, sensitivity)
    step = 10.0 ** math.floor(math.log10(facts.size_bytes / 2))
    curve = inputs.frontier
    protected = [item for item in facts.protections if item.choice.format.weight_bits >= 8]
    return Section(
        "plan",
        "What the plan protects, and why",
        {
            "plan": plan,
            "facts": facts,
            "protected": protected[: 2 * _TOP],
            "protected_count": len(protected),
            "allocation": charts_plan.allocation_chart(sensitivity.units, plan),
            "stages": charts_plan.stage_chart(facts.stages),
            "choices": plan_facts.planned_choices(plan),
            "label": Labels.of(sensitivity.choices),
            "frontier": charts_plan.frontier_chart(curve, plan, facts.alternatives) if curve else None,
            "exchanges": plan_facts.exchanges(curve, plan, step) if curve else [],
            "step": step,
        },
    )


def _engine(inputs: Inputs) -> Section | None:
    if inputs.engine is None and inputs.bench is None:
        return None
    engines = [("mixed", inputs.engine), ("16-bit", inputs.reference_engine)]
    given = [(label, engine) for label, engine in engines if engine is not None]
    counts = charts_engine.format_counts(inputs.engine) if inputs.engine else []
    return Section(
        "engine",
        "What was built",
        {
            "engine": inputs.engine,
            "verification": inputs.verification,
            "reference": inputs.reference_engine,
            "plan": inputs.plan,
            "counts": counts,
            "realised": sum(row.realised for row in counts),
            "others": [u for u in inputs.engine.units if not charts_engine.as_planned(u)] if inputs.engine else [],
            "bytes": charts_engine.bytes_chart(given) if given else None,
            "bench": inputs.bench,
            "latency": charts_engine.latency_chart(inputs.bench) if inputs.bench else None,
        },
    )


def _served(inputs: Inputs) -> Section | None:
    served = inputs.served
    if served is None:
        return None
    errors = charts_served.action_error(served, inputs.decisions, inputs.contract) if inputs.decisions else None
    engine_ms = [decision.latency_ms for decision in served.decisions if decision.latency_ms is not None]
    response_ms = [decision.response_ms for decision in served.decisions if decision.response_ms is not None]
    return Section(
        "served",
        "What the node served",
        {
            "served": served,
            "parity": inputs.parity,
            "errors": errors,
            "strips": charts_served.error_strips(errors) if errors else None,
            "times": [
                charts_served.times(title, values)
                for title, values in (("engine", engine_ms), ("camera image to action", response_ms))
                if values
            ],
        },
    )


_SECTIONS: Sequence[Callable[[Inputs], Section | None]] = (
    _evidence,
    _layers,
    _time,
    _plan,
    _engine,
    _served,
    _conventions,
)


def _missing(inputs: Inputs) -> list[Missing]:
    wanted = (
        ("plan", "the allocation and what it protects", "--plan"),
        ("frontier", "what more or less memory would change", "--frontier"),
        ("calibration", "the camera images under the evidence maps", "--calibration"),
        ("engine", "bytes and formats of the engine", "--engine"),
        ("verification", "what was proven of the engine, and where it ran", "--verification"),
        ("reference_engine", "the 16-bit engine's bytes beside it", "--reference-engine"),
        ("bench", "latency and memory of both engines", "--bench"),
        ("served", "served actions, response times and drops", "--served"),
        ("parity", "whether served actions equal those of the engine in process", "--parity"),
        ("decisions", "action error of the served actions against full precision", "--decisions"),
    )
    found = [Missing(what, option, COMMANDS[kind]) for kind, what, option in wanted if kind not in inputs.sources]
    if not inputs.rollouts:
        found.append(Missing("closed-loop success rates", "--rollout", COMMANDS["rollout"]))
    return found
