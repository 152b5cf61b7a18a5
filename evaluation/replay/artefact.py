"""A replay's folder: replay.json, replay.html and, with thresholds, junit.xml."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.replay.compare import WorstFrame
from evaluation.replay.page import WorstView, picture, render
from evaluation.replay.perform import Outcome
from evaluation.replay.run import Answers
from evaluation.replay.thresholds import write_junit
from vla_policy.core.files import write_json
from vla_policy.core.observe import observe
from vla_policy.core.outputs import FolderKind
from vla_policy.core.synchroniser import Frame

SCHEMA_VERSION = 1
REPLAY = FolderKind(
    "replay", "replay.json", ("replay.html", "junit.xml", "served/metadata.yaml", "served/*.mcap", "served/*.db3")
)


def write(folder: Path, outcome: Outcome, seconds: float) -> None:
    """Writes all of it. seconds: how long the replay took."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": REPLAY.name,
        "parents": outcome.sources,
        "unnorm_key": outcome.request.unnorm_key,
        "candidate": _summary(outcome.candidate),
        "reference": _summary(outcome.reference) if outcome.reference else None,
        "comparison": _without_nan(asdict(outcome.comparison)) if outcome.comparison else None,
        "checks": [asdict(item) for item in outcome.checks],
    }
    write_json(folder / REPLAY.index, content)
    if outcome.request.thresholds:
        write_junit(folder / "junit.xml", outcome.checks, seconds)
    (folder / "replay.html").write_text(render(outcome, _views(outcome)), encoding="utf-8")


def _summary(answers: Answers) -> dict[str, Any]:
    return {
        "name": answers.name,
        "frames": len(answers.stamp_ns),
        "episodes": answers.episodes,
        "drops": answers.drops,
        "left_out": [asdict(item) for item in answers.left_out],
        "decisions_sha256": answers.sha256,
        "latency_ms": answers.latency_ms.tolist(),
    }


def _without_nan(value: Any) -> Any:
    """NaN (an empty bin) as null: JSON has no other word for it."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _views(outcome: Outcome) -> tuple[WorstView, ...]:
    """The worst frames with their pictures, read from the bag once more: holding every image would not scale."""
    comparison, reference, contract = outcome.comparison, outcome.reference, outcome.request.contract
    if comparison is None or reference is None:
        return ()
    wanted = {item.stamp_ns for item in comparison.worst}
    pictures = {
        frame.stamp_ns: tuple(picture(image) for image in observe(frame, contract).images)
        for frame in outcome.request.recording.frames(contract)
        if isinstance(frame, Frame) and frame.stamp_ns in wanted
    }
    names = [dimension.name for dimension in contract.action.dimensions]

    def view(worst: WorstFrame, reference: Answers, candidate: Answers) -> WorstView:
        before, after = reference.actions[worst.index].tolist(), candidate.actions[worst.candidate_index].tolist()
        values = tuple(zip(names, before, after, strict=False))  # of a chunk, its first row
        return WorstView(worst, pictures[worst.stamp_ns], candidate.instructions[worst.candidate_index], values)

    return tuple(view(worst, reference, outcome.candidate) for worst in comparison.worst)
