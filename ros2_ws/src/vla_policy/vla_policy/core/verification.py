"""`verification.json`: what `engine_build verify` proved of an engine, and on which processor that has decided."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import read_json, write_json

KIND = "verification"
_VERSION = 1


@dataclass(frozen=True)
class Decisions:
    """An engine's decisions beside a torch policy's over a number of states.

    What a policy decides by, its scores, is the action tokens' logits or, without tokens, the normalised actions.

    scores_error: root mean square difference of the scores over their standard deviation, worst state.
    scores_max_abs: largest difference of any score.
    cosine: smallest cosine between the two score vectors of a position, means removed.
    equal_tokens: share of action tokens that are equal. equal_decisions: share of states with all tokens equal.
    action_max_abs: largest difference of an action value, in the action's units, both deciding freely.
    stray_states: in which the torch policy prefers something else than an action.

    Without tokens the shares are None.
    """

    scores_error: float
    scores_max_abs: float
    cosine: float
    equal_tokens: float | None
    equal_decisions: float | None
    action_max_abs: float
    stray_states: int


@dataclass(frozen=True)
class Largest:
    """The largest error of some layers, whose it is, and what was allowed: root mean square over a token's values,
    relative to the values' own."""

    error: float
    layer: str
    allowed: float


@dataclass(frozen=True)
class Layers:
    """Single layers beside torch's, on the engine's own inputs: by format, and what happens from layer to layer."""

    formats: Mapping[str, Largest]
    between: Largest


@dataclass(frozen=True)
class Reference:
    """An engine's numbers beside the torch policy's.

    processor: what the engine ran on. statistics: of the policy's, the ones that states and actions were normalised by.
    allowed: largest accepted `scores_error` in the same formats. layers: None where the backend shows no values inside.
    summary: all of it in words.
    """

    processor: str
    states: int
    source: str
    statistics: str
    allowed: float
    same_formats: Decisions
    full_precision: Decisions
    layers: Layers | None
    summary: str


@dataclass(frozen=True)
class Verification:
    """The outcome for one engine.

    engine: its folder's name. parents: sha256 of the engine's manifest, which holds its files' hashes, of the policy,
    and of the calibration set, if states were taken from one. tensors, bytes: how many were compared with what the
    policy and the plan give. not_compared: what could not be, and why; empty where everything was. reference: None
    where nothing was run.
    """

    engine: str
    parents: Mapping[str, str]
    tensors: int
    bytes: int
    not_compared: str
    reference: Reference | None

    @property
    def ran_on_target(self) -> bool:
        """Whether the engine has decided on a processor of its target: others cannot load it."""
        return self.reference is not None

    @property
    def summary(self) -> str:
        """In words."""
        lines = [f"{self.tensors} tensors, {self.bytes:,} bytes, are exactly what policy and plan give"]
        if self.not_compared:
            lines.append(f"not compared: {self.not_compared}")
        if self.reference is None:
            lines.append("the engine was not run")
        else:
            lines.append(f"on {self.reference.processor}: {self.reference.summary}")
        return "\n".join(lines)

    def save(self, path: Path | str) -> None:
        """Writes the artefact; `ran_on_target` and `processor` stand in it for whoever reads nothing else."""
        processor = self.reference.processor if self.reference else None
        content = asdict(self) | {"ran_on_target": self.ran_on_target, "processor": processor}
        write_json(path, {"schema_version": _VERSION, "kind": KIND, **content})

    @staticmethod
    def load(path: Path | str) -> "Verification":
        """Raises ArtefactError for a file that is damaged, incomplete or of another version."""
        content = read_json(path, KIND, _VERSION)
        try:
            return Verification(
                content["engine"],
                dict(content["parents"]),
                content["tensors"],
                content["bytes"],
                content["not_compared"],
                _reference(content["reference"]) if content["reference"] else None,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(
                f"{path}: entry {error} is missing or malformed; make it again with `engine_build verify --out`"
            ) from error


def _reference(raw: Mapping[str, Any]) -> Reference:
    decisions = {name: Decisions(**raw[name]) for name in ("same_formats", "full_precision")}
    return Reference(**(dict(raw) | decisions | {"layers": _layers(raw["layers"]) if raw["layers"] else None}))


def _layers(raw: Mapping[str, Any]) -> Layers:
    return Layers({name: Largest(**entry) for name, entry in raw["formats"].items()}, Largest(**raw["between"]))
