"""What an engine's numbers beside a policy's may differ by, and the record of them; needs no torch."""

from pathlib import Path

from engine_build.backends import find_backend
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.runner import Engine
from vla_policy.core.verification import Decisions, Layers, Reference


def tolerance_of(manifest: Manifest) -> float:
    """Largest accepted `scores_error` of whole decisions against torch with the same formats."""
    backend = find_backend(manifest.backend)
    return max(backend.tolerance(Format.parse(unit.planned)) for unit in manifest.units)


def check_scores(folder: Path, engine: Engine, same: Decisions) -> None:
    """Raises ArtefactError for scores that differ by more than is allowed."""
    allowed = tolerance_of(engine.manifest)
    if not same.scores_error <= allowed:
        raise ArtefactError(
            f"{folder}: {engine.policy.scored} differ from the torch policy with the same formats by "
            f"{same.scores_error:.2e} of their standard deviation, allowed {allowed:.0e}; build it again"
        )


def reference_of(
    engine: Engine, source: str, states: int, same: Decisions, full: Decisions, layers: Layers | None
) -> Reference:
    """The record. source: where the states are from."""
    allowed = tolerance_of(engine.manifest)
    return Reference(
        processor=engine.processor,
        states=states,
        source=source,
        statistics=engine.unnorm_key,
        allowed=allowed,
        same_formats=same,
        full_precision=full,
        layers=layers,
        summary=f"{states} states; torch with the same formats: {engine.policy.scored} differ by "
        f"{same.scores_error:.1e} of their standard deviation (allowed {allowed:g}){_equal(same)}{_by_format(layers)}; "
        f"torch in full precision: actions differ by up to {full.action_max_abs:.3g}{_equal(full)}{_strays(full)}",
    )


def _equal(decisions: Decisions) -> str:
    return "" if decisions.equal_tokens is None else f", {decisions.equal_tokens:.1%} equal tokens"


def _strays(decisions: Decisions) -> str:
    states = decisions.stray_states
    return f"; in {states} of the states it prefers a token that is no action" if states else ""


def _by_format(layers: Layers | None) -> str:
    if layers is None:
        return ""
    of = [f"{fmt} {found.error:.0e} (allowed {found.allowed:g})" for fmt, found in sorted(layers.formats.items())]
    return f", single layers by up to {', '.join(of)}, between them {layers.between.error:.0e}"
