"""The bit plan: which format and recipe every layer gets, why, and what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibrator.quantizers.rows import WHOLE, RowBits
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import named_file, read_json, sha256_file, write_json
from vla_policy.core.formats import Choice

KIND = "plan"
SCHEMA_VERSION = 2
_NAMED = 3
_ROUNDING = 1e-12


@dataclass(frozen=True)
class PlanSize:
    """Bits on disk by kind: integer codes (or 16-bit weights), weight scales with input operators, where there are any,
    and tensors that are not quantized."""

    weight_bits: int
    scale_bits: int
    unquantized_bits: int

    @property
    def total_bits(self) -> int:
        return self.weight_bits + self.scale_bits + self.unquantized_bits


@dataclass(frozen=True)
class Plan:
    """`plan.json` as a type.

    assignment: choice by layer name, every measured layer; of layers that `rows` splits, by part. scored_by: of choices
    that were not measured, because the target runs them in the place of others, the measured ones that are their
    scores. objective, bound, gap: of Mix-QVLA Eq. (14a); the gap is (objective - bound) / objective, 0 for a certified
    optimum. average_bits: over the weights of the planned layers. bitops: per action. latency_ms: from the target's
    table, None without one; backend: what that was measured with, and the engine is built for. details: every other
    entry of the file. input_peaks: largest |input|, as scored, of layers whose input the target rounds with a fixed
    scale.
    """

    assignment: Mapping[str, Choice]
    policy_sha256: str
    alpha: float
    beta: float
    objective: float
    bound: float
    gap: float
    solver: str
    average_bits: float
    size: PlanSize
    bitops: int
    latency_ms: float | None
    target: str | None
    backend: str | None = None
    scored_by: Mapping[Choice, Choice] = field(default_factory=dict)
    input_peaks: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    rows: RowBits = WHOLE

    @property
    def fallbacks(self) -> dict[Choice, Choice]:
        """Choices of the plan that were not measured, and those that are their scores."""
        used = set(self.assignment.values())
        return {runs: measured for runs, measured in self.scored_by.items() if runs in used}

    @property
    def proven(self) -> bool:
        """Whether the gap is none but for the rounding of sums."""
        return self.gap < _ROUNDING

    @property
    def standing(self) -> str:
        """What the objective is: a certified optimum is said of exhaustive tables only."""
        proven = "" if self.proven else f" within {100 * self.gap:.2g} %"
        if self.details.get("screened"):
            return f"optimum{proven} of a screened table, most of whose scores are estimates"
        return f"certified optimum{proven}" if self.solver == "HIGHS" else f"optimum{proven}"

    def measured(self, unit: str) -> Choice:
        """The measured choice that is the score of a layer's own."""
        choice = self.assignment[unit]
        return self.scored_by.get(choice, choice)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.details,
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "assignment": {unit: choice.to_json() for unit, choice in self.assignment.items()},
            "scored_by": [
                {"choice": choice.to_json(), "measured": measured.to_json()}
                for choice, measured in self.scored_by.items()
            ],
            "input_peaks": dict(self.input_peaks),
            "policy_sha256": self.policy_sha256,
            "alpha": self.alpha,
            "beta": self.beta,
            "objective": self.objective,
            "bound": self.bound,
            "gap": self.gap,
            "solver": self.solver,
            "average_bits": self.average_bits,
            "size_bits": self.size.total_bits,
            "weight_bits": self.size.weight_bits,
            "scale_bits": self.size.scale_bits,
            "unquantized_bits": self.size.unquantized_bits,
            "bitops": self.bitops,
            "latency_ms": self.latency_ms,
            "target": self.target,
            "backend": self.backend,
        }

    def save(self, path: Path | str) -> None:
        """Writes the plan, whole or not at all, behind the file of its split layers' rows, if there are any."""
        split = {}
        if self.rows:
            beside = rows_path(Path(path))
            split = {"rows": {"name": beside.name, "sha256": self.rows.save(beside)}}
        write_json(path, self.to_json() | split)

    @staticmethod
    def load(path: Path | str) -> "Plan":
        """Raises ArtefactError when the file is missing, damaged or no plan."""
        raw = read_json(path, KIND, SCHEMA_VERSION)
        try:
            plan = Plan(
                assignment=_assignment(path, raw),
                policy_sha256=raw["policy_sha256"],
                size=PlanSize(raw["weight_bits"], raw["scale_bits"], raw["unquantized_bits"]),
                scored_by={
                    Choice.from_json(entry["choice"]): Choice.from_json(entry["measured"]) for entry in raw["scored_by"]
                },
                backend=raw.get("backend"),
                input_peaks=raw.get("input_peaks", {}),
                rows=_rows(path, raw),
                **{name: raw[name] for name in _PLAIN},
            )
        except KeyError as error:
            raise ArtefactError(f"{path}: entry {error} is missing; allocate again") from error
        known = plan.to_json().keys() | {"rows"}
        return Plan(**{**plan.__dict__, "details": {key: raw[key] for key in raw if key not in known}})


_PLAIN = ("alpha", "beta", "objective", "bound", "gap", "solver", "average_bits", "bitops", "latency_ms", "target")


def rows_path(plan: Path) -> Path:
    """Where the rows of a plan's split layers are."""
    return plan.with_name(f"{plan.stem}.rows.safetensors")


def _rows(path: Path | str, raw: Mapping[str, Any]) -> RowBits:
    """Raises ArtefactError for a file that is not the plan's."""
    if raw.get("rows") is None:
        return WHOLE
    try:
        name, sha256 = raw["rows"]["name"], raw["rows"]["sha256"]
    except (KeyError, TypeError) as error:
        raise ArtefactError(f"{path}: entry 'rows' lacks {error}; allocate again") from error
    return RowBits.load(named_file(Path(path).parent, name), sha256)


@dataclass(frozen=True)
class Assignment:
    """The part of a plan that weights and engines are made from. sha256: of its file. target, backend,
    input_peaks: see Plan. choices: by layer, or by part of the layers that `rows` splits.
    """

    choices: Mapping[str, Choice]
    target: str | None
    backend: str | None
    input_peaks: Mapping[str, float]
    sha256: str
    rows: RowBits = WHOLE

    @staticmethod
    def load(path: Path, policy_sha256: str, layers: Sequence[str]) -> "Assignment":
        """The plan in `path`, made for exactly this policy and naming exactly its layers; else ArtefactError."""
        raw = read_json(path, KIND, SCHEMA_VERSION)
        made_for = str(raw.get("policy_sha256"))
        if made_for != policy_sha256:
            raise ArtefactError(
                f"{path}: made for the policy with sha256 {made_for[:12]}, this one has {policy_sha256[:12]}; "
                "allocate a plan for this policy"
            )
        choices, rows = _assignment(path, raw), _rows(path, raw)
        units = rows.units(layers)
        _refuse(path, "unknown units", set(choices) - set(units), "they are not layers of this policy")
        _refuse(path, "unknown split layers", set(rows.bits) - set(layers), "they are not layers of this policy")
        _refuse(path, "missing units", set(units) - set(choices), "every live layer needs a format")
        rows.check(choices, path)
        ordered = {name: choices[name] for name in units}
        target, backend = raw.get("target"), raw.get("backend")
        return Assignment(ordered, target, backend, raw.get("input_peaks", {}), sha256_file(path), rows)


def _refuse(path: Path, what: str, names: set[str], why: str) -> None:
    if names:
        raise ArtefactError(f"{path}: {what}: {some_of(sorted(names))}; {why}; allocate a plan for this policy")


def some_of(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _assignment(path: Path | str, raw: Mapping[str, Any]) -> dict[str, Choice]:
    entries = raw.get("assignment")
    if not isinstance(entries, dict):
        raise ArtefactError(f"{path}: 'assignment' is missing; expected an object from layer to format and recipe")
    choices = {}
    for unit, entry in entries.items():
        try:
            choices[unit] = Choice.from_json(entry)
        except (KeyError, TypeError, AttributeError) as error:
            expected = '{"format": "w4a16_g64", "recipe": {"method": "rtn", "version": 1, "parameters": {}}}'
            raise ArtefactError(f"{path}: layer {unit!r}: expected e.g. {expected}, got {entry!r}") from error
    return choices
