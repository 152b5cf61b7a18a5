"""Thresholds that make a replay a test: read from YAML, checked one by one, written as JUnit XML."""

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from evaluation.replay.compare import Comparison
from evaluation.replay.run import Answers
from vla_policy.core.contract import ActionContract
from vla_policy.core.errors import ContractError
from vla_policy.core.yaml_fields import Fields

NO_REFERENCE = "thresholds on errors, tokens or gripper need a reference: add --against, --served or --live"
_CHECKING = (
    *("max_mean_error", "max_error", "min_token_agreement", "max_gripper_disagreement", "max_added_gripper_flips"),
    *("max_latency_p99_ms", "max_drops", "identical: true"),
)


@dataclass(frozen=True)
class Thresholds:
    """None leaves a figure unchecked. Errors are in each dimension's unit and keyed by its name.

    max_unmatched: frames that only one side answered; checked wherever anything is compared, as no other figure counts
    them.
    """

    max_mean_error: dict[str, float]
    max_error: dict[str, float]
    min_token_agreement: float | None
    max_gripper_disagreement: float | None
    max_added_gripper_flips: int | None
    max_latency_p99_ms: float | None
    max_drops: int | None
    max_unmatched: int
    identical: bool

    @property
    def needs_reference(self) -> bool:
        """Whether any threshold compares with another answer."""
        limits = (self.min_token_agreement, self.max_gripper_disagreement, self.max_added_gripper_flips)
        return bool(self.max_mean_error or self.max_error or self.identical) or any(item is not None for item in limits)


@dataclass(frozen=True)
class Check:
    """One threshold and what was found."""

    name: str
    passed: bool
    detail: str


def load_thresholds(path: Path, action: ActionContract) -> Thresholds:
    """Reads a threshold file. Raises ContractError for an unknown key or dimension, and where nothing is checked."""
    fields = Fields.load(path, "replay_thresholds")
    dimensions = tuple(dimension.name for dimension in action.dimensions)
    thresholds = Thresholds(
        max_mean_error=_by_dimension(fields.mapping("max_mean_error", {}), dimensions),
        max_error=_by_dimension(fields.mapping("max_error", {}), dimensions),
        min_token_agreement=_part(fields, "min_token_agreement", lower_counts=False),
        max_gripper_disagreement=_part(fields, "max_gripper_disagreement", lower_counts=True),
        max_added_gripper_flips=fields.take("max_added_gripper_flips", int, None),
        max_latency_p99_ms=fields.positive("max_latency_p99_ms", None),
        max_drops=_count(fields, "max_drops", None),
        max_unmatched=_count(fields, "max_unmatched", 0) or 0,
        identical=fields.take("identical", bool, False),
    )
    fields.end()
    gripper = (thresholds.max_gripper_disagreement, thresholds.max_added_gripper_flips)
    if action.gripper is None and gripper != (None, None):
        raise ContractError(f"{path}: thresholds on the gripper check nothing: the contract commands none")
    if not thresholds.needs_reference and (thresholds.max_latency_p99_ms, thresholds.max_drops) == (None, None):
        raise ContractError(f"{path}: checks nothing; set at least one of {', '.join(_CHECKING)}")
    return thresholds


def check(
    thresholds: Thresholds, candidate: Answers, reference: Answers | None, comparison: Comparison | None
) -> list[Check]:
    """Every threshold that is set. Raises ContractError when one needs a reference and there is none."""
    checks = []
    if thresholds.max_drops is not None:
        for name, answers in (("drops", candidate), ("drops of the reference", reference)):
            if answers is not None:
                dropped = answers.drops
                checks.append(_at_most(name, sum(dropped.values()), thresholds.max_drops, f"{dropped or ''}"))
    if thresholds.max_latency_p99_ms is not None:
        latency = float(np.percentile(candidate.latency_ms, 99))
        checks.append(_at_most("latency p99", latency, thresholds.max_latency_p99_ms, "ms"))
    if not thresholds.needs_reference:
        return checks
    if comparison is None:
        raise ContractError(NO_REFERENCE)
    return checks + _compared(thresholds, comparison)


def _compared(thresholds: Thresholds, comparison: Comparison) -> list[Check]:
    unmatched = comparison.only_reference + comparison.only_candidate
    detail = f"frames that only one side answered; {comparison.frames} are compared"
    checks = [_at_most("unmatched frames", unmatched, thresholds.max_unmatched, detail)]
    for name, limits, attribute in (
        ("mean", thresholds.max_mean_error, "mean"),
        ("max", thresholds.max_error, "maximum"),
    ):
        for dimension in comparison.dimensions:
            if dimension.name in limits:
                found = getattr(dimension, attribute)
                checks.append(_at_most(f"{name} error {dimension.name}", found, limits[dimension.name], dimension.unit))
    if thresholds.min_token_agreement is not None:
        agreement, least = comparison.token_agreement, thresholds.min_token_agreement
        if agreement is None:
            raise ContractError("min_token_agreement: these engines decide no tokens; bound their errors instead")
        checks.append(Check("token agreement", agreement >= least, f"{agreement:.4f}, at least {least}"))
    if thresholds.max_gripper_disagreement is not None and comparison.gripper_disagreement is not None:
        limit = thresholds.max_gripper_disagreement
        checks.append(_at_most("gripper disagreement", comparison.gripper_disagreement, limit, "of the frames"))
    if thresholds.max_added_gripper_flips is not None and comparison.gripper_flips is not None:
        added = comparison.gripper_flips[1] - comparison.gripper_flips[0]
        checks.append(_at_most("added gripper flips", added, thresholds.max_added_gripper_flips, ""))
    if thresholds.identical:
        detail = f"{comparison.identical_frames} of {comparison.frames + unmatched} frames have identical actions"
        checks.append(Check("identical", comparison.identical_frames == comparison.frames + unmatched, detail))
    return checks


def write_junit(path: Path, checks: list[Check], seconds: float) -> None:
    """One test case per threshold, as continuous integration reads it."""
    failures = sum(not item.passed for item in checks)
    suite = ElementTree.Element(
        "testsuite", name="replay", tests=str(len(checks)), failures=str(failures), errors="0", time=f"{seconds:.3f}"
    )
    for item in checks:
        case = ElementTree.SubElement(suite, "testcase", classname="replay", name=item.name)
        if item.passed:
            ElementTree.SubElement(case, "system-out").text = item.detail
        else:
            ElementTree.SubElement(case, "failure", message=item.detail)
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def _by_dimension(fields: Fields, dimensions: tuple[str, ...]) -> dict[str, float]:
    limits = {name: fields.finite(name, None) for name in dimensions}
    fields.end()
    if negative := [name for name, limit in limits.items() if limit is not None and limit < 0]:
        raise ContractError(f"{fields.where}: {negative[0]}: expected 0 or more, got {limits[negative[0]]}")
    return {name: limit for name, limit in limits.items() if limit is not None}


def _part(fields: Fields, key: str, lower_counts: bool) -> float | None:
    """A part of the whole, less the end at which the threshold could not fail."""
    value = fields.finite(key, None)
    if value is not None and not ((0 <= value < 1) if lower_counts else (0 < value <= 1)):
        allowed = "[0, 1)" if lower_counts else "(0, 1]"
        raise ContractError(f"{fields.where}: {key}: expected a part in {allowed}, got {value}")
    return value


def _count(fields: Fields, key: str, default: int | None) -> int | None:
    value = fields.take(key, int, default)
    if value is not None and value < 0:
        raise ContractError(f"{fields.where}: {key}: expected 0 or more, got {value}")
    return value


def _at_most(name: str, found: float, limit: float, unit: str) -> Check:
    return Check(name, found <= limit, f"{found:.6g}, at most {limit:g} {unit}".rstrip())
