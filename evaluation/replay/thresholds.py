"""Thresholds that make a replay a test: read from YAML, checked one by one, written as JUnit XML."""

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from evaluation.replay.compare import Comparison
from evaluation.replay.run import Answers
from vla_policy.core.errors import ContractError
from vla_policy.core.yaml_fields import Fields


@dataclass(frozen=True)
class Thresholds:
    """None leaves a figure unchecked. Errors are in each dimension's unit and keyed by its name."""

    max_mean_error: dict[str, float]
    max_error: dict[str, float]
    min_token_agreement: float | None
    max_gripper_disagreement: float | None
    max_added_gripper_flips: int | None
    max_latency_p99_ms: float | None
    max_drops: int | None
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


def load_thresholds(path: Path, dimensions: tuple[str, ...]) -> Thresholds:
    """Reads a threshold file. Raises ContractError for an unknown key or dimension."""
    fields = Fields.load(path, "replay_thresholds")
    thresholds = Thresholds(
        max_mean_error=_by_dimension(fields.mapping("max_mean_error", {}), dimensions),
        max_error=_by_dimension(fields.mapping("max_error", {}), dimensions),
        min_token_agreement=fields.take("min_token_agreement", float, None),
        max_gripper_disagreement=fields.take("max_gripper_disagreement", float, None),
        max_added_gripper_flips=fields.take("max_added_gripper_flips", int, None),
        max_latency_p99_ms=fields.take("max_latency_p99_ms", float, None),
        max_drops=fields.take("max_drops", int, None),
        identical=fields.take("identical", bool, False),
    )
    fields.end()
    return thresholds


def check(thresholds: Thresholds, candidate: Answers, comparison: Comparison | None) -> list[Check]:
    """Every threshold that is set. Raises ContractError when one needs a reference and there is none."""
    checks = []
    if thresholds.max_drops is not None:
        checks.append(_at_most("drops", sum(candidate.drops.values()), thresholds.max_drops, f"{candidate.drops}"))
    if thresholds.max_latency_p99_ms is not None:
        latency = float(np.percentile(candidate.latency_ms, 99))
        checks.append(_at_most("latency p99", latency, thresholds.max_latency_p99_ms, "ms"))
    if comparison is None:
        if thresholds.needs_reference:
            raise ContractError("thresholds on errors, tokens or gripper need a reference: add --against or --served")
        return checks
    for name, limits, attribute in (
        ("mean", thresholds.max_mean_error, "mean"),
        ("max", thresholds.max_error, "maximum"),
    ):
        for dimension in comparison.dimensions:
            if dimension.name in limits:
                found = getattr(dimension, attribute)
                checks.append(_at_most(f"{name} error {dimension.name}", found, limits[dimension.name], dimension.unit))
    if thresholds.min_token_agreement is not None:
        found, least = comparison.token_agreement, thresholds.min_token_agreement
        if found is None:
            raise ContractError("min_token_agreement: these engines decide no tokens; bound their errors instead")
        checks.append(Check("token agreement", found >= least, f"{found:.4f}, at least {least}"))
    if thresholds.max_gripper_disagreement is not None and comparison.gripper_disagreement is not None:
        limit = thresholds.max_gripper_disagreement
        checks.append(_at_most("gripper disagreement", comparison.gripper_disagreement, limit, "of the frames"))
    if thresholds.max_added_gripper_flips is not None and comparison.gripper_flips is not None:
        added = comparison.gripper_flips[1] - comparison.gripper_flips[0]
        checks.append(_at_most("added gripper flips", added, thresholds.max_added_gripper_flips, ""))
    if thresholds.identical:
        detail = f"{comparison.identical_frames} of {comparison.frames} frames have identical actions"
        checks.append(Check("identical", comparison.identical_frames == comparison.frames, detail))
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
    limits = {name: value for name in dimensions if (value := fields.take(name, float, None)) is not None}
    fields.end()
    return limits


def _at_most(name: str, found: float, limit: float, unit: str) -> Check:
    return Check(name, found <= limit, f"{found:.6g}, at most {limit:g} {unit}".rstrip())
